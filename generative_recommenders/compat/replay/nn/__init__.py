"""RePlay's ``replay.nn`` by its module paths."""
