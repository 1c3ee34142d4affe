"""Suites: encoders evaluated on several data sets, each by its own protocol, with averages and ranks."""
