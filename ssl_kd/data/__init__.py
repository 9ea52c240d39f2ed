"""Images in: where they come from (`sources`) and how they reach the mesh, batch by batch (`loader`)."""
