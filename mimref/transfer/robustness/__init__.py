"""Accuracy of a fine-tuned encoder on corrupted and shifted images."""
