"""Fine-tuning on labels, and classification by what was fine-tuned."""
