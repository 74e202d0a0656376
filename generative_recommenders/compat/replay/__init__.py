"""RePlay's documented modules over this package's parts."""
