"""Tensor operations with fast paths, each with its plain reference."""
