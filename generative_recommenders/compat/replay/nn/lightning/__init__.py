"""RePlay's Lightning side."""
