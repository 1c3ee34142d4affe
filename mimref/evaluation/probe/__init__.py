"""Linear and attentive probing of frozen features."""
