"""Measures of features without labels, and verdicts on encoders and blocks based on them."""
