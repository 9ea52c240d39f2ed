"""Images in: storage formats (`readers`), which rows (`splits`), pixels of them (`decode`), what a run sees
(`sources`), batches on the mesh (`loader`), sets in device memory (`resident`); and stores packed once
for all of these (`prepare`)."""
