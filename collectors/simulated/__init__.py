"""Simulated fleet: seeded, of any size, with numbers that follow physics loosely and leases exactly."""
