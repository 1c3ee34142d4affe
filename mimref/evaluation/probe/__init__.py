"""Linear probing of frozen features."""
