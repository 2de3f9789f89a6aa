"""Light corrections of a model, each tried on executed models and kept where it gains."""
