"""The history in one DuckDB file: transactions, recovery, migrations, maintenance."""
