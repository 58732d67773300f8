"""Leases: their life cycle, durable changes, events and service time."""
