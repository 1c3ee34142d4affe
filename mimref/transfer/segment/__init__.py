"""Semantic segmentation on frozen patch tokens."""
