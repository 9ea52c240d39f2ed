"""Images in: storage formats (`readers`), what a run sees (`sources`), and batches on the mesh (`loader`)."""
