"""Simulation: replays a trace of requests with the planner's code, audits the placements, and computes a bound."""
