"""Listings and shard indices, which locate the images of large data sets, cached on disk."""
