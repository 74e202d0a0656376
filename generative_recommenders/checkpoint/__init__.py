"""Checkpoints: files, store, retention."""
