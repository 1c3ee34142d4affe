"""Masked-image-modelling pre-training, for users who start without public weights."""
