"""A history without rows, made once in a process: its views take half a second."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from corral.processors.storage import Database


@functools.cache
def _made() -> tuple[Path, TemporaryDirectory[str]]:
    folder = TemporaryDirectory()
    Database(path := Path(folder.name) / "history.duckdb").close()
    return path, folder


def empty_history() -> Path:
    """The closed file, to be copied; it goes with this process."""
    return _made()[0]


def new_database(folder: Path, **options: Any) -> Database:
    """A history without rows in `history.duckdb` of a folder."""
    return Database(Path(shutil.copy(empty_history(), folder / "history.duckdb")), **options)
