#!/usr/bin/env bash
# DuckDB 1.5.5: time_bucket() of a TIMESTAMPTZ counts from UTC, whatever the session's zone, and date_trunc() does not.
#
# Expected: with SET TimeZone both begin a day at midnight of that zone, as all that computes with TIMESTAMPTZ does.
# Observed: date_trunc('day', …) begins at midnight in the zone; time_bucket(INTERVAL 1 DAY, …) at midnight UTC, which
# is 19:00 in New York, and 05:30 in India. Months likewise. With the zone as its third argument it begins at midnight.
# For Corral: docs/querying.md says to name the zone in time_bucket(), and reports do not use it.
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5
"$folder/venv/bin/python" - <<'PYTHON'
import duckdb

print("duckdb", duckdb.__version__)
changed = False
for zone, begins in (("UTC", "00:00"), ("America/New_York", "19:00"), ("Asia/Kolkata", "05:30")):
    with duckdb.connect() as connection:
        connection.execute(f"SET TimeZone = '{zone}'")
        calls = {
            "date_trunc('day', t)": "00:00",
            "time_bucket(INTERVAL 1 DAY, t)": begins,
            "time_bucket(INTERVAL 1 MONTH, t)": begins,
            f"time_bucket(INTERVAL 1 DAY, t, '{zone}')": "00:00",
        }
        for call, guessed in calls.items():
            sql = f"SELECT strftime({call}, '%Y-%m-%d %H:%M') FROM (SELECT to_timestamp(1764550800) AS t)"
            [shown] = connection.execute(sql).fetchone()
            print(f"{zone}: {call} = {shown}")
            changed = changed or not shown.endswith(guessed)
raise SystemExit(changed)
PYTHON
