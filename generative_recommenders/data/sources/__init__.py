"""Data sources: public data sets, downloads, archives and the synthetic books."""
