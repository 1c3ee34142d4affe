"""Clustering of frozen features."""
