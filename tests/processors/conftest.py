"""A processor on a real server, and a lake: Parquet in a folder, the catalog in a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.processors.embedded import EmbeddedHistory
from corral.processors.service import process
from corral.processors.storage.lake import lake as lakes
from nats.aio.client import Client
from support.empty_history import empty_history
from support.history import Asking
from support.postgres import Postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of the file's own; the test is skipped where there is none."""
    found = Postgres()
    found.start()
    yield found
    found.remove()


@pytest.fixture
def lake(postgres: Postgres, tmp_path: Path) -> lakes.Lake:
    """A new lake."""
    return lakes.Lake(postgres.database(f"lake_{time.time_ns()}"), str(tmp_path / "lake"), threads=1)


@pytest.fixture
async def processor(server: EmbeddedServer, nc: Client, tmp_path: Path) -> AsyncIterator[Asking]:
    """One in this process; what asks it."""
    ready = asyncio.Event()
    shutil.copy(empty_history(), tmp_path / "history.duckdb")
    task = asyncio.create_task(process(EmbeddedHistory(tmp_path / "history.duckdb"), nats_url=server.url, ready=ready))
    await asyncio.wait([task, asyncio.create_task(ready.wait())], return_when=asyncio.FIRST_COMPLETED)
    yield Asking(nc)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
