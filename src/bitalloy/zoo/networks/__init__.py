"""Networks in plain PyTorch for the families that need their own; imported only where a model is exported."""
