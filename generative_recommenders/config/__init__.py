"""Settings: the schema, gin names, checks and hints."""
