"""Runs one fault as a process of its own, in namespaces of its own where this machine allows that."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from support.chaos.load import Account

TESTS = Path(__file__).parents[2]
APART = ("unshare", "--net", "--mount")


@functools.cache
def may_be_apart() -> bool:
    """Whether network and mounts may be had for oneself here."""
    try:
        tried = subprocess.run([*APART, "ip", "link", "set", "lo", "up"], capture_output=True, timeout=10, check=False)
    except OSError:
        return False
    return tried.returncode == 0


def account_of(name: str, folder: Path, seconds: float, *, apart: bool) -> Account:
    """Break a cluster; what was expected and found afterwards.

    The account is kept in the folder that CORRAL_CHAOS_OUT names, too.
    """
    if apart and not may_be_apart():
        pytest.skip("this user may not make network and mount namespaces (unshare --net --mount)")
    command = [sys.executable, "-P", "-m", "support.chaos.main", name, str(folder), f"{seconds:g}"]
    done = subprocess.run(
        [*APART, *command] if apart else command,
        env={**os.environ, "PYTHONPATH": str(TESTS), **({"CORRAL_CHAOS_APART": "1"} if apart else {})},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    try:
        account = msgspec.json.decode(done.stdout.strip().rpartition("\n")[2], type=Account)
    except msgspec.DecodeError:
        raise AssertionError(f"{name} in {folder}: {done.stdout[-1000:]}{done.stderr[-3000:]}") from None
    if out := os.environ.get("CORRAL_CHAOS_OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / f"{name}.json").write_bytes(msgspec.json.encode(account))
    return account
