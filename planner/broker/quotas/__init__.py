"""Groups: accounts, reclaim of what is borrowed, elastic leases, and idle ones."""
