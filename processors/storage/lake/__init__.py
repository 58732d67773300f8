"""The history in DuckLake: Parquet files, a catalog in PostgreSQL, several processors."""
