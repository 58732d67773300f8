"""The fleet as the planner knows it: a fold of events, and its hosts by state."""
