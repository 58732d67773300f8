"""Runners: start the jobs of a host, and supervise them."""
