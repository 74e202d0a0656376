"""Processes of a run: launch, collectives, error propagation."""
