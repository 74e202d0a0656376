"""Attention over the tokens of a layout."""
