"""The output of a run on its way to the bus: bounded by construction, and readable at both ends.

The output is cut into chunks of `LOG_CHUNK_BYTES`. The first ones have subjects of their own, `h0` and so on. The later
ones share those of the tail in turns, `t0` and so on, so that the stream keeps the last ones. A chunk that is not full
yet is published again, as a whole, once it has grown enough. What is new is published at once as `n0`, of which the
stream keeps only the last piece: it is for those who follow. If the output grows faster than it can be published, the
middle is left out.
"""

from __future__ import annotations

import os
import re
import stat
from datetime import UTC, datetime
from typing import Final

from msgspec import Struct

from ..schemas.work.runs import LOG_CHUNK_BYTES, LOG_HEAD_CHUNKS, LOG_TAIL_CHUNKS, LogChunk
from .status import Status

AGAIN_SHARE: Final = 0.5
"""A chunk is published again once it has grown by this share since it was last published."""
AGAIN_SECONDS: Final = 15.0
"""It is published again after this time in any case, if it has grown."""
NEW: Final = "n0"
"""Part of the subject of what is new."""
_PROGRESS: Final = re.compile(rb"^::progress[ \t]+([0-9]*\.?[0-9]+)(%?)[ \t]*\r?$", re.MULTILINE)


class Piece(Struct, frozen=True):
    """A piece of output to publish.

    Attributes:
        part: part of the subject: `h0`, `t0`, `n0` and so on.
        chunk: the piece.
    """

    part: str
    chunk: LogChunk


def part_of(offset: int) -> str:
    """Part of the subject for the chunk at an offset, which is a multiple of `LOG_CHUNK_BYTES`."""
    number = offset // LOG_CHUNK_BYTES
    if number < LOG_HEAD_CHUNKS:
        return f"h{number}"
    return f"t{(number - LOG_HEAD_CHUNKS) % LOG_TAIL_CHUNKS}"


def progress_in(data: bytes) -> float | None:
    """The last progress that a piece of output says, 0 to 1, as `::progress 0.42` or `::progress 42%`."""
    found: float | None = None
    for match in _PROGRESS.finditer(data):
        value = float(match[1]) / (100.0 if match[2] else 1.0)
        if 0.0 <= value <= 1.0:
            found = value
    return found


def open_output(status: Status) -> int:
    """Open the output of a run to read; -1 if it isn't a file, or no longer the one that the run has written.

    The job's account may have put a link to another file in its place, which only the runner may read.
    """
    if not status.output:
        return -1
    try:
        file = os.open(status.output, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return -1
    found = os.fstat(file)
    if (found.st_dev, found.st_ino) != (status.output_device, status.output_inode) or not stat.S_ISREG(found.st_mode):
        os.close(file)
        return -1
    return file


def size_of_output(status: Status) -> int:
    """Size of the output of a run, in bytes; 0 if it is no file, or no longer the one that the run has written."""
    file = open_output(status)
    if file < 0:
        return 0
    try:
        return os.fstat(file).st_size
    finally:
        os.close(file)


class Output:
    """The output of one run, followed.

    Args:
        run_id: id of the run.
        file: descriptor of the file; it is closed by `close`.

    Attributes:
        size: of the file when it was last read, in bytes.
        progress: that it says; None if it doesn't.
        finished: true once all of it has been handed out, after the end of the run.
    """

    def __init__(self, run_id: str, file: int) -> None:
        self.size = 0
        self.progress: float | None = None
        self.finished = False
        self._run_id = run_id
        self._file = file
        self._read = 0
        self._chunk = 0
        self._published = 0
        self._published_at = 0.0

    def rewind(self) -> None:
        """Begin anew, since pieces were lost: those that the stream has are only replaced."""
        self._read = self._chunk = self._published = 0
        self.finished = False

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def pieces(self, now: float, *, ended: bool = False) -> list[Piece]:
        """Pieces to publish now.

        Args:
            now: time of a monotonic clock, in seconds.
            ended: true if nothing more is printed.
        """
        self.size = os.fstat(self._file).st_size if self._file >= 0 else 0
        if self.size == self._read and not ended:
            return self._grown(now, b"") if self._published < self._read and self._due(now) else []
        pieces: list[Piece] = []
        while self._read < self.size:
            self._skip()
            end = self._chunk + LOG_CHUNK_BYTES
            data = os.pread(self._file, end - self._chunk, self._chunk)
            if self._chunk + len(data) <= self._read:
                break
            new = data[self._read - self._chunk :]
            self._progress(data, len(data) - len(new))
            at, self._read = self._read, self._chunk + len(data)
            full = self._read == end
            if full or self._due(now):
                pieces += self._grown(now, data)
            else:
                pieces.append(self._piece(NEW, at, new))
            if full:
                self._chunk = self._published = self._read
        if ended:
            pieces += self._last()
        return pieces

    def _skip(self) -> None:
        """Leave out the middle, where more has been printed than the stream keeps."""
        last = max(0, (self.size - 1) // LOG_CHUNK_BYTES) * LOG_CHUNK_BYTES
        first = last - (LOG_TAIL_CHUNKS - 1) * LOG_CHUNK_BYTES
        head = LOG_HEAD_CHUNKS * LOG_CHUNK_BYTES
        if self._chunk >= head and first > self._chunk:
            self._chunk = self._read = self._published = first

    def _due(self, now: float) -> bool:
        grown = self._read - self._published
        had = self._published - self._chunk
        return grown > 0 and (grown >= AGAIN_SHARE * had or now - self._published_at >= AGAIN_SECONDS)

    def _grown(self, now: float, data: bytes) -> list[Piece]:
        data = data or os.pread(self._file, self._read - self._chunk, self._chunk)
        self._published, self._published_at = self._chunk + len(data), now
        return [self._piece(part_of(self._chunk), self._chunk, data)]

    def _last(self) -> list[Piece]:
        self.finished = True
        if self._read == self._chunk > 0:
            # An empty chunk would take the place of the oldest one.
            self._chunk -= LOG_CHUNK_BYTES
        data = os.pread(self._file, self._read - self._chunk, self._chunk) if self._file >= 0 else b""
        return [self._piece(part_of(self._chunk), self._chunk, data, ended=True)]

    def _progress(self, data: bytes, before: int) -> None:
        # A line may have begun in what was read before.
        begin = data.rfind(b"\n", 0, before) + 1
        found = progress_in(data[begin:])
        self.progress = self.progress if found is None else found

    def _piece(self, part: str, offset: int, data: bytes, *, ended: bool = False) -> Piece:
        chunk = LogChunk(run_id=self._run_id, time=datetime.now(UTC), offset=offset, data=data, ended=ended)
        return Piece(part, chunk)
