#!/usr/bin/env bash
# DuckDB 1.5.5: a cast to an integer rounds halves to even from DOUBLE and FLOAT, and away from zero from DECIMAL and text.
#
# Expected: one rule, that of round(), which is away from zero; or truncation, as in C and Python.
# Observed: 2.5::DOUBLE::INTEGER is 2 and 2.5::INTEGER is 3, since the literal is a DECIMAL. '2.5'::INTEGER is 3,
# '2.5'::DOUBLE::INTEGER is 2, and round(2.5::DOUBLE) is 3. A column of DOUBLE from Parquet counts otherwise than the
# same values read from CSV as DECIMAL.
# For Corral: counts in bins use round() before the cast, and numpy code that computes the same rounds in its way.
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
values = ("0.5", "1.5", "2.5", "-2.5")
even, away = (0, 2, 2, -2), (1, 2, 3, -3)
changed = False
for form, guessed in (
    ("{}::DOUBLE::INTEGER", even), ("{}::FLOAT::INTEGER", even), ("'{}'::DOUBLE::INTEGER", even),
    ("({}::DECIMAL(9, 1))::INTEGER", away), ("'{}'::INTEGER", away), ("round({}::DOUBLE)::INTEGER", away),
):
    found = duckdb.execute("SELECT " + ", ".join(form.format(value) for value in values).replace("-2.5::", "(-2.5)::")).fetchone()
    print(form, "of", *values, "=", found)
    changed = changed or found != guessed
raise SystemExit(changed)
PYTHON
