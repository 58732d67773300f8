"""Groups that share the fleet: quotas, fair share, and whom to preempt. Pure: no bus, no clock."""
