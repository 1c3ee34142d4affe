"""Images: where they come from, how they are cropped and augmented, and in which order they are seen."""
