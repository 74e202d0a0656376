"""Evaluation: exact ranks, metrics, list metrics, baselines."""
