"""All measurements for a GPU in one command, each part in a process of its own."""
