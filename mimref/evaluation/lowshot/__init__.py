"""Low-shot classification on frozen features."""
