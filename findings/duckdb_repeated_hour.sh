#!/usr/bin/env bash
# DuckDB 1.5.5: of the hour that comes twice at the end of summer time, date_trunc moves the first into the second.
#
# Expected: in a zone with summer time, `date_trunc('hour', t)` of a TIMESTAMPTZ is the begin of the hour that `t` is
# in, never later than `t`; a day of 25 hours has 25 hours. `date_trunc` and `time_bucket` agree about hours, days,
# months.
# Observed: the first of the two hours is moved into the second: 00:40 UTC becomes 01:00 UTC. A count by hour has 24
# hours that day, one of them twice as high. `date_trunc('minute')` is right. So is `time_bucket` about hours, but its
# days and months begin at midnight of UTC (two in the morning in Berlin), unless the zone is its third argument: with
# it all of hours, days and months are right, whatever the session's zone is.
# For Corral: sessions of the history compute in UTC. docs/querying.md says which form to use for a zone
# (tests/processors/test_query_service.py).
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
connection = duckdb.connect()
connection.execute("SET TimeZone = 'Europe/Berlin'")
FIRST, SECOND = "TIMESTAMPTZ '2026-10-25 00:40:00+00'", "TIMESTAMPTZ '2026-10-25 01:40:00+00'"
TIMES = "range(TIMESTAMPTZ '2026-10-24 22:00:00+00', TIMESTAMPTZ '2026-10-25 23:00:00+00', INTERVAL 10 minute) AS t(x)"
SUMMER = "TIMESTAMPTZ '2026-07-01 00:30:00+02'"
CASES = {
    f"SELECT date_trunc('hour', {FIRST})::VARCHAR": "2026-10-25 02:00:00+01",
    f"SELECT date_trunc('hour', {SECOND})::VARCHAR": "2026-10-25 02:00:00+01",
    f"SELECT date_trunc('hour', {FIRST}) > {FIRST}": True,
    f"SELECT date_trunc('minute', {FIRST}) = {FIRST}": True,
    f"SELECT time_bucket(INTERVAL 1 hour, {FIRST})::VARCHAR": "2026-10-25 02:00:00+02",
    f"SELECT count(DISTINCT date_trunc('hour', x)) FROM {TIMES}": 24,
    f"SELECT count(DISTINCT time_bucket(INTERVAL 1 hour, x)) FROM {TIMES}": 25,
    f"SELECT max(n) FROM (SELECT count(*) AS n FROM {TIMES} GROUP BY date_trunc('hour', x))": 12,
    f"SELECT date_trunc('day', {SUMMER})::VARCHAR": "2026-07-01 00:00:00+02",
    f"SELECT time_bucket(INTERVAL 1 day, {SUMMER})::VARCHAR": "2026-06-30 02:00:00+02",
    f"SELECT date_trunc('month', {SUMMER})::VARCHAR": "2026-07-01 00:00:00+02",
    f"SELECT time_bucket(INTERVAL 1 month, {SUMMER})::VARCHAR": "2026-06-01 02:00:00+02",
    f"SELECT time_bucket(INTERVAL 1 day, {SUMMER}, 'Europe/Berlin')::VARCHAR": "2026-07-01 00:00:00+02",
    f"SELECT time_bucket(INTERVAL 1 month, {SUMMER}, 'Europe/Berlin')::VARCHAR": "2026-07-01 00:00:00+02",
    f"SELECT count(DISTINCT time_bucket(INTERVAL 1 hour, x, 'Europe/Berlin')) FROM {TIMES}": 25,
}
changed = False
for statement, wanted in CASES.items():
    [value] = connection.execute(statement).fetchone()
    print(f"{statement}: {value}")
    changed = changed or value != wanted
raise SystemExit(changed)
PYTHON
