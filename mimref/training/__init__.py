"""Training machinery: optimizer groups, weight averaging, saved state, run log."""
