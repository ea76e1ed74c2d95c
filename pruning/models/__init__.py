"""A pipeline by name, the images that it makes, and pruned pipelines as folders."""
