"""The machinery of training runs: job, folder, checkpoints, log, signals."""
