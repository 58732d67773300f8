"""What a runner keeps on disk: a folder for each run, and a journal of the runs that it has begun to start.

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
from ..schemas.runs import Run
from .status import Status

COMPACT_LINES: Final = 10_000
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
        path: path of the folder.
        work: path of the folder that the job's account has: its script, and what it prints unless it names a file.
    """

    def __init__(self, path: Path, work: Path) -> None:
        self.path = path
        self.work = work

    @property
    def key(self) -> str:
        """Name of the run."""
        return self.path.name

    def write_order(self, run: Run) -> None:
        """Keep an order, with the job."""
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            self._replace("order", codec.encode(run))
        else:
            self._write("order", codec.encode(run))

    def read_order(self) -> Run | None:
        """The order, without the job once it is closed; None if it can't be read."""
        for name in ("order", "closed"):
            with contextlib.suppress(OSError, codec.DecodeError):
                return codec.decode((self.path / name).read_bytes(), Run)
        return None

    def write_start(self, start: dict[str, Any]) -> None:
        """Write what the supervisor shall start."""
        self._write("start.json", json.dumps(start).encode())

    @property
    def has_start(self) -> bool:
        """True while there is something to start that no supervisor has read."""
        return (self.path / "start.json").exists()

    def write_wanted(self, wanted: dict[str, Any]) -> None:
        """Write what the supervisor shall do."""
        self._replace("wanted.json", json.dumps(wanted).encode())

    def read_status(self) -> Status | None:
        """What became of the run; None before its claim."""
        try:
            whole, _, _ = (self.path / "status").read_bytes().rpartition(b"\n")
        except OSError:
            return None
        try:
            return msgspec.json.decode(whole.rpartition(b"\n")[2], type=Status)
        except msgspec.MsgspecError:
            # It was killed as it began to write, or the machine has failed.
            return Status(pid=0)

    def mark_stopped(self) -> None:
        """Tell the supervisor that SIGUSR2 is for this run, where nothing can be written.

        Raises:
            OSError: not even this is possible.
        """
        (self.path / "status").chmod(0o600 | stat.S_ISVTX)

    def close(self, run: Run) -> None:
        """Remove what is not needed after the end is reported; the output stays."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._replace("closed", codec.encode(msgspec.structs.replace(run, spec=None)))
        for name in ("order", "start.json", "wanted.json"):
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).unlink()

    @property
    def closed(self) -> bool:
        """True once the end of the run is reported."""
        return (self.path / "closed").exists()

    @property
    def logged(self) -> bool:
        """True once all of the output has been handed to the bus."""
        return (self.path / "logged").exists()

    def set_logged(self) -> None:
        """Note that all of the output has been handed to the bus."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / "logged").touch()

    def forget_order(self) -> bool:
        """Remove the order of a run that can't be started: a later start of the runner must not take it up.

        Returns:
            True if nothing is left of it.
        """
        for name in ("order", "start.json"):
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        return not any(os.path.lexists(self.path / name) for name in ("order", "start.json"))

    def forget_start(self) -> None:
        """Remove what the supervisor was to start: it has been read, or another has started it."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / "start.json").unlink()

    def remove(self) -> None:
        """Remove the run with its output."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def age_seconds(self) -> float:
        """Time since the run was closed, or since it was last changed."""
        try:
            return time.time() - self.path.stat().st_mtime
        except OSError:
            return 0.0

    def _write(self, name: str, content: bytes) -> None:
        with os.fdopen(os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)

    def _replace(self, name: str, content: bytes) -> None:
        self._write(f"{name}.new", content)
        (self.path / f"{name}.new").replace(self.path / name)


class Journal:
    """Runs that a runner has begun to start, durable.

    Args:
        folder: folder of the host.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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

    def folder_of(self, key: str) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self._folder / "runs" / key, self._folder / "work" / key)

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
        left = memoryview(b"\n" + lines if self._torn else lines)
        self._torn = True
        while left:
            left = left[os.write(self._open, left) :]
        os.fdatasync(self._open)
        self._torn = False
        self._begun.update(dict.fromkeys(new, boot_id))

    def forget(self, keys: Iterable[str]) -> None:
        """Forget runs whose folders are removed; the file is written anew from time to time."""
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
        """Close the file."""
        os.close(self._open)

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
