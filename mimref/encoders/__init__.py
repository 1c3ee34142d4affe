"""Encoders: tokens of any block of a vision transformer, and the files they come from."""
