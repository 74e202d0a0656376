"""Preparation of raw ratings into a folder of memory-mapped columns."""
