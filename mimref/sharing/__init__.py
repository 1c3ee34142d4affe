"""Sharing encoders: folders that Hugging Face's libraries load, their model cards, and uploads."""
