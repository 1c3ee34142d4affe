"""Every block of an encoder: k-NN, feature statistics, reconstruction loss."""
