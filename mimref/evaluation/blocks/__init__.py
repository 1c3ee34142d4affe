"""Scores of every block of an encoder: k-NN, feature statistics, reconstruction loss."""
