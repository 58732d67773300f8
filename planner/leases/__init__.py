"""Durable promises: the life of a lease, the bucket, and who leads."""
