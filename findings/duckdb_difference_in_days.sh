#!/usr/bin/env bash
# DuckDB 1.5.5: the difference of two TIMESTAMPTZ counts days of the session's zone, so its epoch() can be an hour off.
#
# Expected: two instants are as far apart as they are, in whatever zone somebody reads them. epoch(a - b) is the same as
# epoch(a) - epoch(b).
# Observed: with a zone that changes its clock in between, differences of a day or more count a local day as 24 hours.
# From midnight to midnight in New York on 1 November 2026 is '1 day', 86,400 seconds, where 90,000 passed; 24 hours and
# a half before that is '24:30:00', so a longer time has the smaller difference. In spring it is an hour too much.
# For Corral: a copy of the history, or a lake, opened in such a zone showed waits and durations that were an hour off.
# Views subtract epoch_us() (60 times as fast besides), and a test reads each of them in three zones.
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
MIDNIGHT = {"autumn": 1793505600, "spring": 1772946000}  # in New York, in seconds since the epoch


def difference(zone: str, begin: int, hours: float) -> tuple[str, float]:
    with duckdb.connect() as connection:
        connection.execute(f"SET TimeZone = '{zone}'")
        apart = f"to_timestamp({begin + round(hours * 3600)}) - to_timestamp({begin})"
        return connection.execute(f"SELECT ({apart})::VARCHAR, epoch({apart})").fetchone()


found = {}
for season, begin in MIDNIGHT.items():
    for hours in (4, 23, 24.5, 25, 72):
        for zone in ("UTC", "America/New_York"):
            text, seconds = found[season, hours, zone] = difference(zone, begin, hours)
            print(f"{season}, {hours} hours after midnight, {zone}: {text}, {seconds:.0f} seconds, passed {hours * 3600:.0f}")
right = all(found[season, hours, "UTC"][1] == hours * 3600 for season, hours, _ in found)
off = {
    (season, hours): found[season, hours, "America/New_York"][1] / 3600 - hours for season, hours, _ in found
}
print("hours off in New York:", off)
guessed = {"autumn": (0, 0, 0, -1, -1), "spring": (0, 1, 1, 1, 1)}
same = all(tuple(off[season, hours] for hours in (4, 23, 24.5, 25, 72)) == guessed[season] for season in guessed)
raise SystemExit(not (right and same))
PYTHON
