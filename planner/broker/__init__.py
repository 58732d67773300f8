"""The broker: decisions on requests, the queue, idempotency, operations on leases, and drains."""
