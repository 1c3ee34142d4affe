"""Evaluation of encoders by transfer: fine-tuning, segmentation, robustness, and suites of data sets."""
