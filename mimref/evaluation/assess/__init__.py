"""Measures of features without labels, and what they say about encoders and blocks."""
