"""State of a runner on disk: a folder for each run, and a journal of the runs that it has begun to start.

A process that is killed loses nothing that it has written; a machine that fails loses what is not synced. So only the
journal is synced, once for all runs that are about to be started together: after a failure of the machine it says which
runs may have been started, and are over. That a run is started once is sure by its claim (`supervisor.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from ..schemas import codec
from ..schemas.work.runs import Run
from .ended import COMPACT_LINES, EndedRuns, write_whole
from .status import Status

_STATUS: Final = msgspec.json.Decoder(Status)
_KEY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,63}-[A-Za-z0-9_-]{1,128}")


def run_key(run: Run) -> str:
    """Name of a run on this host: its id and its lease, since ids may come again after the bus has lost all its data.

    Raises:
        ValueError: the id can't be the name of a folder.
    """
    key = f"{run.run_id}-{run.lease_id}"
    if _KEY.fullmatch(key) is None:
        raise ValueError(f"{run.run_id!r} can't be the id of a run")
    return key


class RunFolder:
    """The folder of a run, which only the runner's account may read.

    Args:
        host: path of the host's folder.
        key: name of the run.

    Attributes:
        key: name of the run.
        path: path of the folder.
        work: path of the folder that the job's account has: its script, and what it prints unless it names a file.
        news: path of the pipe that supervisors write to.
    """

    # Texts: a path object takes longer to make than most files to write.
    __slots__ = ("key", "news", "path", "work")

    def __init__(self, host: str, key: str) -> None:
        self.key = key
        self.path = f"{host}/runs/{key}"
        self.work = f"{host}/work/{key}"
        self.news = f"{host}/news"

    def write_order(self, run: Run) -> None:
        """Keep an order, with the job."""
        try:
            os.mkdir(self.path, 0o700)
        except FileExistsError:
            self._replace("order", codec.encode(run))
        else:
            self._write("order", codec.encode(run))

    def read_order(self) -> Run | None:
        """The order; None if it can't be read."""
        # Earlier versions wrote a file `closed` rather than a line of the host's file `ended`.
        for name in ("order", "closed"):
            with contextlib.suppress(OSError, codec.DecodeError):
                return codec.decode(Path(self.path, name).read_bytes(), Run)
        return None

    def write_start(self, start: dict[str, Any]) -> None:
        """Write what the supervisor shall start."""
        self._write("start.json", json.dumps(start).encode())

    @property
    def has_start(self) -> bool:
        """True while there is something to start that no supervisor has read."""
        return os.path.exists(f"{self.path}/start.json")

    def write_wanted(self, wanted: dict[str, Any]) -> None:
        """Write what the supervisor shall do."""
        self._replace("wanted.json", json.dumps(wanted).encode())

    def read_status(self) -> Status | None:
        """Return the status of the run; None before its claim."""
        try:
            with open(f"{self.path}/status", "rb", buffering=0) as file:
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return None
        try:
            return _STATUS.decode(whole.rpartition(b"\n")[2])
        except msgspec.MsgspecError:
            # It was killed as it began to write, or the machine has failed.
            return Status(pid=0)

    def mark_stopped(self) -> None:
        """Tell the supervisor that SIGUSR2 is for this run, where nothing can be written.

        Raises:
            OSError: not even this is possible.
        """
        os.chmod(f"{self.path}/status", 0o600 | stat.S_ISVTX)

    @property
    def was_closed(self) -> bool:
        """True if an earlier version of the runner has closed it."""
        return os.path.exists(f"{self.path}/closed")

    @property
    def was_logged(self) -> bool:
        """True if an earlier version of the runner has handed all of its output to the bus."""
        return os.path.exists(f"{self.path}/logged")

    def forget_order(self) -> bool:
        """Remove the order of a run that has ended or can't be started: no start of the runner must take it up.

        Returns:
            True if nothing is left of it.
        """
        paths = [f"{self.path}/{name}" for name in ("order", "start.json", "wanted.json")]
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return not any(os.path.lexists(path) for path in paths)

    def forget_start(self) -> None:
        """Remove what the supervisor was to start: it has been read, or another has started it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path}/start.json")

    def remove(self) -> None:
        """Remove the run with its output."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def age_seconds(self) -> float:
        """Time since the run was closed, or since it was last changed."""
        try:
            return time.time() - os.stat(self.path).st_mtime
        except OSError:
            return 0.0

    def _write(self, name: str, content: bytes) -> None:
        file = os.open(f"{self.path}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            write_whole(file, content)
        finally:
            os.close(file)

    def _replace(self, name: str, content: bytes) -> None:
        self._write(f"{name}.new", content)
        os.replace(f"{self.path}/{name}.new", f"{self.path}/{name}")


class Journal:
    """Runs that a runner has begun to start, durable.

    Args:
        folder: folder of the host.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = str(folder)
        self._file = folder / "journal"
        folder.mkdir(parents=True, exist_ok=True)
        for name, mode in (("", 0o711), ("runs", 0o700), ("work", 0o711)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name).chmod(mode)
        self._begun: dict[str, str] = {}
        self._lines = 0
        self._torn = False
        """The end of the file may be a part of a line."""
        self._read()
        self._open = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        _sync_folder(folder)
        self.ended = EndedRuns(folder / "ended")

    def folder_of(self, key: str) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self._path, key)

    def folders(self) -> Iterator[RunFolder]:
        """The folders of all runs."""
        for name in sorted(os.listdir(self._folder / "runs")):
            yield self.folder_of(name)

    def begun_in(self, key: str) -> str | None:
        """Boot id of the machine when a run was begun to be started; None if it was not."""
        return self._begun.get(key)

    def begin(self, keys: Iterable[str], boot_id: str) -> None:
        """Note that runs are about to be started; durable when it returns.

        Raises:
            OSError: it can't be written.
        """
        new = [key for key in keys if key not in self._begun]
        if not new:
            return
        lines = "".join(f"{key} {boot_id}\n" for key in new).encode()
        # The line break ends a line of which only a part could be written.
        whole = b"\n" + lines if self._torn else lines
        self._torn = True
        write_whole(self._open, whole)
        os.fdatasync(self._open)
        self._torn = False
        self._begun.update(dict.fromkeys(new, boot_id))

    def forget(self, keys: Iterable[str]) -> None:
        """Forget runs whose folders are removed; the file is written anew from time to time."""
        keys = list(keys)
        self.ended.forget(keys)
        for key in keys:
            self._begun.pop(key, None)
            self._lines += 1
        if self._lines > COMPACT_LINES:
            self._lines = 0
            new = self._folder / "journal.new"
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.writelines(f"{key} {boot}\n" for key, boot in self._begun.items())
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._file)
            _sync_folder(self._folder)
            os.close(self._open)
            self._open = os.open(self._file, os.O_WRONLY | os.O_APPEND)

    def close(self) -> None:
        """Close the files."""
        os.close(self._open)
        self.ended.close()

    def _read(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            text = self._file.read_text()
            self._torn = text != "" and not text.endswith("\n")
            for line in text.splitlines():
                key, _, boot = line.partition(" ")
                # A machine that fails, or a full disk, may leave half a line.
                if _KEY.fullmatch(key):
                    self._begun[key] = boot


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
