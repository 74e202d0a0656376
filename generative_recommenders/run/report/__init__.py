"""Report of a run, or of several beside each other, as one HTML page without a reference to the network."""
