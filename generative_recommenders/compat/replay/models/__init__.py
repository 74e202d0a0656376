"""RePlay's ``replay.models`` by its module path."""
