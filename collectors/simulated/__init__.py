"""A fleet that is not there: seeded, of any size, with numbers that obey physics loosely and leases exactly."""
