"""Images: reading, cropping and augmenting them, batch by batch."""
