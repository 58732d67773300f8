"""Live state of the fleet: a fold of events, and an index of hosts by state."""
