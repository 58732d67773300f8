"""Placement by opportunity cost: prices of devices, valuations, and a vectorized search."""
