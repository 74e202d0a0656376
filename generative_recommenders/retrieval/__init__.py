"""Retrieval of the best items for a query."""
