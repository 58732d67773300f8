"""Every fault, one cluster each (`make chaos`): what was promised is there afterwards, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chaos.faults import FAULTS, NEEDS_NAMESPACES
from support.chaos.parts import faketime
from support.chaos.run import account_of

SECONDS = 8.0


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", list(FAULTS))
def test_fault(name: str, tmp_path: Path) -> None:
    if name.startswith("clock_") and faketime() is None:
        pytest.skip("no clock can be set for one process without libfaketime (apt-get install libfaketime)")
    account = account_of(name, tmp_path, SECONDS, apart=name in NEEDS_NAMESPACES)
    assert account.wrong == [], account
    assert account.rows_found + account.rows_refused == account.rows_expected > 0
    assert account.leases_found == account.leases_expected > 0
