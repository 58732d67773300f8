"""Runs whose end is reported, in one file of the host: a file for each run takes longer to make than all the rest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from ..schemas.work.runs import Run

COMPACT_LINES: Final = 10_000
"""Lines that are not needed any more, after which a file is written anew."""


class Ended(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the file.

    Attributes:
        key: name of the run.
        run: it, without its job, once its end is reported; null otherwise.
        logged: true once all of its output has been handed to the bus.
    """

    key: str
    run: Run | None = None
    logged: bool = False


class EndedRuns:
    """Runs whose end is reported, or whose output has been handed to the bus.

    A process that is killed loses nothing of it. After a failure of the machine the last lines may be missing: the
    journal says then that these runs are over.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._gone: set[str] = set()
        self._open = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        # The line break ends a line of which only a part could be written.
        self._torn = True

    def read(self) -> dict[str, Ended]:
        """Return the record of each run, by key."""
        found: dict[str, Ended] = {}
        for line in self._path.read_bytes().splitlines():
            with contextlib.suppress(msgspec.MsgspecError):
                one = _LINE.decode(line)
                before = found.get(one.key, one)
                found[one.key] = replace(one, run=one.run or before.run, logged=one.logged or before.logged)
        return found

    def add_closed(self, key: str, run: Run) -> None:
        """Note that the end of a run is reported.

        Raises:
            OSError: it can't be written.
        """
        self._add(Ended(key=key, run=replace(run, spec=None)))

    def add_logged(self, key: str) -> None:
        """Note that all of a run's output has been handed to the bus.

        Raises:
            OSError: it can't be written.
        """
        self._add(Ended(key=key, logged=True))

    def forget(self, keys: Iterable[str]) -> None:
        """Forget runs whose folders are removed; the file is written anew from time to time."""
        self._gone.update(keys)
        if len(self._gone) > COMPACT_LINES:
            kept = [one for key, one in self.read().items() if key not in self._gone]
            new = self._path.with_suffix(".new")
            new.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in kept))
            new.replace(self._path)
            os.close(self._open)
            self._open = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            self._gone.clear()

    def close(self) -> None:
        """Close the file."""
        os.close(self._open)

    def _add(self, one: Ended) -> None:
        line = msgspec.json.encode(one) + b"\n"
        whole = b"\n" + line if self._torn else line
        self._torn = True
        write_whole(self._open, whole)
        self._torn = False


def write_whole(file: int, content: bytes) -> None:
    """Write to a file descriptor, all of it.

    Raises:
        OSError: it can't be written, or not all of it.
    """
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]


_LINE: Final = msgspec.json.Decoder(Ended)
