"""RePlay's losses."""
