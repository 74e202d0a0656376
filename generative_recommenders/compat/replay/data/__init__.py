"""Schema of features."""
