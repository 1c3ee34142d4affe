"""Fine-tuning on labels, and classification with the fine-tuned encoder."""
