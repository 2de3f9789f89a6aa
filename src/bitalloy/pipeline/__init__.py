"""The stages in their order. The only package that knows it."""
