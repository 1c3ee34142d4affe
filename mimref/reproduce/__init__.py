"""Suites of runs that reproduce the paper's measurements at a size that a few cores can handle."""
