"""Durable state of the planner: the bucket, its settings and writes, and leader election."""
