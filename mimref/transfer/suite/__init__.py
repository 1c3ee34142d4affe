"""Suites: encoders on a list of data sets, by a protocol each, with averages and ranks."""
