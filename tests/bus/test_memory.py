"""Memory that is given back while a process goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import duckdb
from corral.bus.process import release_memory, resident_bytes
connection = duckdb.connect()
ask = "SELECT sum(range), count(DISTINCT range % 97) FROM range(100000)"
expected = connection.execute(ask).fetchall()
for _ in range(3):
    before = resident_bytes()
    release_memory()
    print(before - resident_bytes())
    assert connection.execute(ask).fetchall() == expected
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives pages of files back")
def test_code_that_is_not_in_use_is_given_back_and_mapped_again() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    released = [int(line) for line in ended.stdout.split()]
    assert len(released) == 3
    assert released[0] > 10 * 2**20
    assert min(released) > 2**20
