"""Readers of raw ratings."""
