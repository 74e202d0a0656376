"""Losses over sampled negatives and over the whole catalogue."""
