"""Similarities of queries and items."""
