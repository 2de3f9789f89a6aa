"""What a shipped plan really does, and what to do where it is off."""
