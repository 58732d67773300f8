"""Processes on devices: attribution to leases, violations, masking."""
