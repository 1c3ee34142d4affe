"""Judging encoders by transfer: fine-tuning, segmentation, suites of data sets, robustness."""
