"""What outlives a planner: the bucket, its records, writes, and the election of a leader."""
