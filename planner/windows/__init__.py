"""Booked windows: when they are, and which devices are chosen for them. Pure functions."""
