"""Evaluation protocols, each a function of feature arrays."""
