"""Products of states with rows of the item table, and sums over them."""
