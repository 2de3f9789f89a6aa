"""Everything that writes a model: rounding, casts, corrected weights, graphs taken apart."""
