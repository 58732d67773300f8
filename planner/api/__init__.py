"""The planner's API on NATS: its endpoints, and the context of a request."""
