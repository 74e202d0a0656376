"""Construction of a run's parts from its settings."""
