"""The stages of a run in their order, which only this package knows."""
