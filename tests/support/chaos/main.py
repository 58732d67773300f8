"""Break a cluster in one way and print the account: `python -m support.chaos.main FAULT FOLDER [SECONDS]`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import uvloop
from support.chaos.faults import FAULTS
from support.chaos.load import Account


async def run(name: str, folder: Path, seconds: float) -> Account:
    account = Account(fault=name, what="")
    began = time.monotonic()
    async with asyncio.timeout(600):
        await FAULTS[name](folder, account, seconds)
    account.seconds = round(time.monotonic() - began, 1)
    return account


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    if "CORRAL_CHAOS_APART" in os.environ:
        # A network of its own begins without even a loopback.
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    made = uvloop.run(run(sys.argv[1], folder, float(sys.argv[3]) if len(sys.argv) > 3 else 10.0))
    print(msgspec.json.encode(made).decode())
    sys.exit(bool(made.wrong))
