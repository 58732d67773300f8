"""NVIDIA devices through NVML: the schedule compiled from the catalogue, inventory, processes, events, Xid codes."""
