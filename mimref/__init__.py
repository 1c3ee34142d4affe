"""mimref refines vision transformers that were pre-trained by masked image modelling."""

__version__ = "0.1.0"
