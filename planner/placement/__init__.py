"""A decision: feasible, rank, select, and the answer in words."""
