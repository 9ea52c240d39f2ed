"""A step that was not finite: kept whole (`capture`), run again and looked into (`witness`), told of (`report`)."""
