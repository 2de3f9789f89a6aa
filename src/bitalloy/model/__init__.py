"""What a model is: read, brought to normal form, and described."""
