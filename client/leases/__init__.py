"""Leases that a process holds: renewal, confirmation, children."""
