"""The planner: live fleet state, placement, leases."""
