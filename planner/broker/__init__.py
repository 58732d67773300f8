"""The broker: decisions on requests, the queue, idempotency, operations on leases, drains, and groups."""
