"""Encoders: the tokens of any block of a vision transformer or another timm model, and the files of weights."""
