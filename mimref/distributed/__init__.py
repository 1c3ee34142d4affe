"""Several processes on one run, as torchrun starts them."""
