"""Placement decisions: filter, rank and select devices, and explain the result."""
