"""What a model is for: preparing its input, reading its output, measuring how good it is. One module per task."""
