"""How numbers are stored: one module for each number format."""
