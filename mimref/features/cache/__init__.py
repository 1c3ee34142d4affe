"""Features on disk, one entry per pass of an encoder over a data set."""
