"""The short form of `make chaos`: each process killed, and one server of three, with load on and an account after."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chaos.run import account_of


@pytest.mark.timeout(300)  # the wait for each recovery has an end of its own
@pytest.mark.long
@pytest.mark.parametrize("name", ["processes_killed", "server_lost"])
def test_nothing_is_lost_and_nothing_is_there_twice(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_CHAOS_FRESH_SECONDS", "10")
    account = account_of(name, tmp_path, 4, apart=False)
    assert account.wrong == [], account
    assert account.rows_found == account.rows_expected > 200
    assert account.leases_found == account.leases_expected > 0
    assert account.promised_twice == account.messages_missing == account.rows_doubled == 0
