"""The method. Knows no model and no host."""
