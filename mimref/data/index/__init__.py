"""Where the images of a large data set are: listings and shard indices, cached on disk."""
