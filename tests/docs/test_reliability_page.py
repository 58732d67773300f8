"""Each promise of docs/reliability.md names existing tests."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_promise_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    promises = [line for line in page.partition("## What breaks")[0].splitlines() if line.startswith("| ")][2:]
    assert len(promises) > 8
    faults = (ROOT / "tests" / "support" / "chaos" / "faults.py").read_text()
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)(?:\[(\w+)\])?`", promise)
        assert named, f"no test proves: {promise}"
        for file, test, parameter in named:
            assert re.search(rf"def {test}\(", (ROOT / file).read_text()), f"{file} has no {test}"
            assert not parameter or f"async def {parameter}(" in faults, f"there is no fault {parameter}"
