"""NVIDIA devices through NVML: the schedule compiled from the catalog, inventory, processes, events, Xid codes."""
