"""Ask Corral from Python: leases, devices and history, sync and async."""
