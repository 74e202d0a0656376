"""RePlay's sequential models."""
