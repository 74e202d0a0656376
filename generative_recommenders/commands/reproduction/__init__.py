"""Reproduction of published tables: lanes of runs, one JSON file a run, and the page of published beside measured
figures."""
