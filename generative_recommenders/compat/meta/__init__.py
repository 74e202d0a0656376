"""Checkpoints of the HSTU authors' public program."""
