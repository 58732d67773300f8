"""The planner's own core over a trace of requests, checked and bounded."""
