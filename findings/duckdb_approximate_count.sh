#!/usr/bin/env bash
# DuckDB 1.5.5: approx_count_distinct is off by 12 % as a rule and by up to 29 %, however few values there are.
#
# Expected: a HyperLogLog of usual size is within 1 or 2 %, and exact, or nearly so, for some ten or hundred values.
# SUMMARIZE, which uses it, is good enough to see whether a column has as many values as rows.
# Observed: the standard deviation is 10 to 14 % from 100 values to 100,000, which is what 64 registers give
# (1.04 / √64 = 13 %). Of 1,000 different numbers it counts 798 to 1,292. SUMMARIZE of 1,000 rows shows 1,249 of them.
# For Corral: views count exactly, and docs/querying.md says that this function estimates, and by how much.
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5
"$folder/venv/bin/python" - <<'PYTHON'
import statistics

import duckdb

print("duckdb", duckdb.__version__)
deviations, worst = [], 0.0
for number in (100, 1_000, 10_000, 100_000):
    errors = []
    for draw in range(40):
        start = draw * 10_000_000
        sql = f"SELECT approx_count_distinct(i) FROM range({start}, {start + number}) AS t(i)"
        errors.append(duckdb.execute(sql).fetchone()[0] / number - 1)
    deviations.append(statistics.pstdev(errors))
    worst = max(worst, *map(abs, errors))
    print(f"{number} values: standard deviation {deviations[-1]:.1%}, from {min(errors):+.1%} to {max(errors):+.1%}")
[shown] = duckdb.execute("SELECT approx_unique FROM (SUMMARIZE SELECT i FROM range(1000) AS t(i))").fetchone()
[counted] = duckdb.execute("SELECT approx_count_distinct(i) FROM range(1000) AS t(i)").fetchone()
print("SUMMARIZE of 1,000 values:", shown, "· approx_count_distinct:", counted)
raise SystemExit(not (all(0.07 < deviation < 0.18 for deviation in deviations) and worst > 0.2))
PYTHON
