"""Processors: from the bus into DuckDB, exactly once, and SQL over it."""
