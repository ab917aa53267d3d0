"""Small random weights, for machines without the real ones."""
