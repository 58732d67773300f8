"""Exactly-once ingest from the streams, in batches."""
