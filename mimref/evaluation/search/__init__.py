"""Search for the images most similar to given ones."""
