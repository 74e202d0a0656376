"""Ablations: cells from a gin file, their runs, and tables with tests of significance."""
