#!/usr/bin/env bash
# msgspec 0.22.0 rounds a time with seven or more decimals up, into the next day; Python and DuckDB 1.5.5 cut it off.
#
# Expected: decimals beyond microseconds are cut off, as by `datetime.fromisoformat` and by a cast in DuckDB. So the
# same text is the same time in all three, and a time before midnight stays before midnight.
# Observed: `2026-12-31T23:59:59.9999999Z`, the end of a day in .NET's resolution, is the next year in msgspec. So is
# the nanosecond before midnight, as Go writes it. In year 9999 it is an error.
# For Corral: little harm, since such an end is then a microsecond later, which is midnight itself. A time that a client
# sends may differ by that from the same text in a query. Options of the command line are read by Python
# (`cli/clock_times.py`).
#
# Exits 0 while all three behave like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check msgspec==0.22.0 duckdb==1.5.5
"$folder/venv/bin/python" - <<'PYTHON'
from datetime import UTC, datetime

import duckdb
import msgspec

print("msgspec", msgspec.__version__, "duckdb", duckdb.__version__)
BEFORE, AFTER = datetime(2026, 12, 31, 23, 59, 59, 999999, UTC), datetime(2027, 1, 1, tzinfo=UTC)
changed = False
for decimals, wanted in (("999999", BEFORE), ("9999994", BEFORE), ("9999999", AFTER), ("999999999", AFTER)):
    text = f"2026-12-31T23:59:59.{decimals}Z"
    found = msgspec.json.decode(f'"{text}"', type=datetime)
    python = datetime.fromisoformat(text)
    [micros] = duckdb.execute("SELECT epoch_us(?::TIMESTAMPTZ)", [text]).fetchone()
    print(f"{text}: msgspec {found:%F %T.%f}, Python {python:%F %T.%f}, DuckDB {micros % 10**9} us")
    changed = changed or found != wanted or python != BEFORE or micros != int(BEFORE.timestamp()) * 10**6 + 999_999
try:
    msgspec.convert("9999-12-31T23:59:59.9999999Z", datetime)
    changed = True
except msgspec.ValidationError as error:
    print("9999-12-31T23:59:59.9999999Z:", error)
raise SystemExit(changed)
PYTHON
