"""Suites of runs that reproduce what the paper measured, at a size that a few cores can show."""
