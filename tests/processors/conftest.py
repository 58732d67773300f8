"""A lake for the tests that need one: Parquet in a folder, the catalog in a real PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from corral.processors.storage import lake as lakes
from postgres import Postgres


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
