"""Readiness of a host's runner: it starts jobs while its folder can be written.

A host that can't write fails jobs as fast as it gets them. So its runner says that it is not ready once a run could not
be started for that, or once its disk is nearly full, and until a check has passed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ..bus.tasks import BackgroundTasks

log = logging.getLogger("corral.runner")

LEAST_FREE_BYTES: Final = 16 * 2**20
"""Free space below which no more jobs are started: orders with scripts take up to a MiB each."""
LEAST_FREE_FILES: Final = 64
"""Free inodes below which no more jobs are started: a run has up to ten files."""
FAULT_SECONDS: Final = 30.0
"""Least time without new jobs after one could not be started, though a check may pass before: as a limit on how often
that happens where checks don't find the cause."""
_PROBE_BYTES: Final = 2**20


class Readiness:
    """Readiness of one host.

    Attributes:
        reason: why no jobs can be started; empty if they can.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._until = float("-inf")

    def fault(self, reason: str, now: float) -> None:
        """Note that a run could not be started.

        Args:
            reason: why.
            now: time of a monotonic clock, in seconds.
        """
        self.reason = reason
        self._until = now + FAULT_SECONDS

    def checked(self, reason: str, now: float) -> bool:
        """Take the result of a check, empty if it has passed; returns true if `reason` changes."""
        before = self.reason
        if reason or now >= self._until:
            self.reason = reason
        return self.reason != before


class FolderCheck:
    """Checks the folder of a runner: by the counts of its file system, and by writing once a run could not be kept.

    Args:
        host: name of the host.
        folder: of the runner's state of the host.
        changed: called when `reason` has changed.
    """

    def __init__(self, host: str, folder: Path, changed: Callable[[], None]) -> None:
        self._host = host
        self._folder = folder
        self._changed = changed
        self._readiness = Readiness()
        self._probing = False
        self._tasks = BackgroundTasks()

    @property
    def reason(self) -> str:
        """Reason why no jobs can be started; empty if they can."""
        return self._readiness.reason

    def fault(self, error: OSError | str) -> None:
        """Note that a run could not be started by an error of the folder; whoever does so reports that run."""
        self._readiness.fault(error if isinstance(error, str) else words(self._folder, error), time.monotonic())
        log.warning("%s: no jobs are started: %s", self._host, self.reason)

    def check(self) -> None:
        """Check the folder; by writing in the background."""
        reason = room(self._folder)
        if reason or not self.reason:
            self._checked(reason)
        elif not self._probing:
            self._probing = True
            self._tasks.start(self._probe(), name=f"probe of {self._host}")

    async def close(self) -> None:
        """End a check in the background."""
        await self._tasks.cancel()

    async def _probe(self) -> None:
        try:
            reason = await asyncio.to_thread(probe, [self._folder / "runs", self._folder / "work"])
        finally:
            self._probing = False
        self._checked(reason)

    def _checked(self, reason: str) -> None:
        if not self._readiness.checked(reason, time.monotonic()):
            return
        if self.reason:
            log.warning("%s: no jobs are started: %s", self._host, self.reason)
        else:
            log.info("%s: jobs are started again", self._host)
        self._changed()


def room(folder: Path) -> str:
    """Return why a folder has no room for more runs, by the counts of its file system; empty if it has."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return words(folder, error)
    if found.f_flag & os.ST_RDONLY:
        return f"{folder}: read-only file system"
    # File systems without counts have 0 in all.
    if found.f_blocks and found.f_bavail * found.f_frsize < LEAST_FREE_BYTES:
        return f"{folder}: less than {LEAST_FREE_BYTES // 2**20} MiB are free"
    if found.f_files and found.f_favail < LEAST_FREE_FILES:
        return f"{folder}: less than {LEAST_FREE_FILES} inodes are free"
    return ""


def probe(folders: Sequence[Path]) -> str:
    """Write to each folder, and return why one can't be written; empty if all can. It may take long on a bad disk."""
    for folder in folders:
        file = folder / ".probe"
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                left = memoryview(bytes(_PROBE_BYTES))
                while left:
                    left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            return words(folder, error)
        finally:
            with contextlib.suppress(OSError):
                file.unlink()
    return ""


def words(folder: Path, error: OSError) -> str:
    """An error of a folder in words."""
    return f"{folder}: {(error.strerror or str(error)).lower()}"
