"""Processors: exactly-once ingest from the bus into DuckDB, and SQL queries over it."""
