"""Construction of a run's parts from its settings, and of single parts by their names."""
