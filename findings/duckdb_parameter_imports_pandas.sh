#!/usr/bin/env bash
# DuckDB 1.5.5 imports pandas 3.1.1, if it is installed, at the first statement with a parameter.
#
# Expected: a program that never makes a data frame never imports pandas; binding the number 1 needs no other library.
# Observed: `execute("SELECT ?", [1])` imports all of pandas; `execute("SELECT 1")` does not. 48 MiB and 0.3 s of CPU
# here.
# For Corral: every processor paid that cost if pandas was installed for notebooks. It now hides pandas from itself
# (`cli/services/process.py`).
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5 pandas==3.1.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import duckdb


def resident_mebibytes() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


print("duckdb", duckdb.__version__)
connection = duckdb.connect()
connection.execute("SELECT 1").fetchall()
without, before = "pandas" in sys.modules, resident_mebibytes()
connection.execute("SELECT ?", [1]).fetchall()
after = "pandas" in sys.modules
print(f"pandas imported without a parameter: {without}; with one: {after}, {resident_mebibytes() - before:.0f} MiB more")
raise SystemExit(without or not after)
PYTHON
