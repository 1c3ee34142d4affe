"""Diagnose in seconds what this machine has and lacks for mimref."""
