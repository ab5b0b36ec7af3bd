"""What a run needs and a model does not."""
