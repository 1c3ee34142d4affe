"""What this machine has and lacks for mimref, found out in seconds."""
