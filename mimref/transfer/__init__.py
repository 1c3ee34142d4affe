"""What frozen and fine-tuned encoders are worth for other tasks."""
