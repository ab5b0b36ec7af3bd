"""How a sweep is made fast."""
