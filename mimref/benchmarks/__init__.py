"""Speed and cost, measured on this machine."""
