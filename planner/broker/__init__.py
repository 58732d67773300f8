"""Requests from arrival to answer: decisions, the queue, idempotency, commands on leases, drains."""
