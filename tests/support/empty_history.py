"""A history without rows, made once in a process: its views take half a second."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

from corral.processors.storage import Database


@functools.cache
def _made() -> tuple[Path, TemporaryDirectory[str]]:
    folder = TemporaryDirectory()
    Database(path := Path(folder.name) / "history.duckdb").close()
    return path, folder


def empty_history() -> Path:
    """The closed file, to be copied; it goes with this process."""
    return _made()[0]
