"""Placement of intervals of a model's layers on unlike devices, to serve the most tokens a second; pure functions."""
