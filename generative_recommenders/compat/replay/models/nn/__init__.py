"""RePlay's ``replay.models.nn`` by its module path."""
