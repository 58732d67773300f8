"""The spill file: messages that wait for the bus on disk, in order, so that they outlive the agent.

A folder of segments (`00000001.spill`, …). Each is a run of records, each record an 8 byte head (length and CRC-32 of
its body, little-endian) and a MessagePack body `[subject, message id, samples, payload]`. Records are written at the
end of the last segment, read from the first, and a segment is deleted when all its records are done. A record that a
crash cut short is found by its CRC: reading of that segment ends there, and everything before it is kept.
"""

from __future__ import annotations

import fcntl
import logging
import os
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from struct import Struct as Layout
from typing import BinaryIO, Final

import msgspec

log = logging.getLogger("corral.collector")

SEGMENT_BYTES: Final = 4 * 2**20
"""A segment is closed once it is this large; disk space comes free a segment at a time."""

_HEAD: Final = Layout("<II")
_SUFFIX: Final = ".spill"
_MAX_RECORD_BYTES: Final = 64 * 2**20


class SpillBusy(RuntimeError):
    """Another agent on this machine uses the spill folder; the message names its process."""


class Record(msgspec.Struct, array_like=True, frozen=True):
    """A message as it is stored on disk."""

    subject: str
    message_id: str
    samples: int
    payload: bytes


class _Segment:
    """One file, with counts of its records: all, done and unread."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self.path = path
        self.records = 0
        self.done = 0
        self.bytes = 0
        self.read_offset = 0
        self.unread = 0
        self.unread_bytes = 0
        self.unread_samples = 0


class Spill:
    """Records on disk, first in, first out.

    Args:
        folder: folder of this agent alone; created if it is missing.

    Attributes:
        unread: number of records that were not read yet.
        unread_bytes: their payload bytes.
        damaged: least number of records that a crash or the disk has damaged.
        lost: records that were stored and could not be read again.
        lost_samples: device samples in them.
        first_own: number of the first segment of this run; those before it are from earlier runs.

    Raises:
        SpillBusy: another agent holds the folder.
        OSError: the folder can't be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unread = 0
        self.unread_bytes = 0
        self.damaged = 0
        self.lost = 0
        self.lost_samples = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Record)
        self._segments: deque[_Segment] = deque()
        self._writer: BinaryIO | None = None
        self._reader: tuple[int, BinaryIO] | None = None
        # It holds lists of processes, which other users must not read.
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(folder / "lock")
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            self._load(path)
        self._next_number = self._segments[-1].number + 1 if self._segments else 1
        self.first_own = self._next_number

    def append(self, records: Sequence[Record], *, read: bool = False) -> list[int]:
        """Append records.

        Args:
            records: in order.
            read: True if they are in memory and need not be read again in this run; only while nothing is unread.

        Returns:
            The segment number of each, for `done`.

        Raises:
            OSError: the disk is full or gone; none of these records is kept.
        """
        if not records:
            return []
        segment = self._tail()
        frames: list[bytes] = []
        for record in records:
            body = self._encoder.encode(record)
            frames += (_HEAD.pack(len(body), zlib.crc32(body)), body)
        frame = b"".join(frames)
        assert self._writer is not None
        try:
            written = self._writer.write(frame)
            if written != len(frame):
                raise OSError(f"only {written} of {len(frame)} bytes were written")
        except OSError:
            self._undo(segment)
            raise
        segment.bytes += len(frame)
        segment.records += len(records)
        if read:
            segment.read_offset = segment.bytes
        else:
            for record in records:
                self._count(segment, record, 1)
        return [segment.number] * len(records)

    def read(self, limit_bytes: int) -> list[tuple[int, Record]]:
        """Read the next records, with their segment numbers, until their payloads reach `limit_bytes`.

        At least one record is read if any is unread.
        """
        found: list[tuple[int, Record]] = []
        taken = 0
        for segment in list(self._segments):
            while segment.read_offset < segment.bytes and (not found or taken < limit_bytes):
                record = self._next(segment)
                if record is None:
                    break
                self._count(segment, record, -1)
                found.append((segment.number, record))
                taken += len(record.payload)
            if found and taken >= limit_bytes:
                break
        if not found:
            self._sweep()
        return found

    def done(self, number: int) -> None:
        """Mark one record of a segment as done: it need not be kept any more."""
        for segment in self._segments:
            if segment.number == number:
                segment.done += 1
                break
        self._sweep()

    def close(self, *, keep: bool = True) -> None:
        """Close the files and unlock the folder; records that are not done stay on disk.

        Args:
            keep: False deletes what this run has written; segments of earlier runs stay.
        """
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._reader is not None:
            self._reader[1].close()
            self._reader = None
        self._sweep()
        for segment in self._segments:
            if not keep and segment.number >= self.first_own:
                segment.path.unlink(missing_ok=True)
        os.close(self._lock)

    def _sweep(self) -> None:
        """Delete the segments at the front whose records are all read and done."""
        while self._segments:
            segment = self._segments[0]
            if segment.done < segment.records or segment.read_offset < segment.bytes:
                return
            if self._writer is not None and segment is self._segments[-1]:
                self._writer.close()
                self._writer = None
            self._segments.popleft()
            if self._reader is not None and self._reader[0] == segment.number:
                self._reader[1].close()
                self._reader = None
            segment.path.unlink(missing_ok=True)

    def _tail(self) -> _Segment:
        if self._writer is not None and self._segments[-1].bytes < SEGMENT_BYTES:
            return self._segments[-1]
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        path = self.folder / f"{self._next_number:08d}{_SUFFIX}"
        self._writer = path.open("ab", buffering=0)
        segment = _Segment(self._next_number, path)
        self._next_number += 1
        self._segments.append(segment)
        return segment

    def _undo(self, segment: _Segment) -> None:
        """Truncate what a failed write left, so that later records can be read."""
        assert self._writer is not None
        try:
            self._writer.truncate(segment.bytes)
        except OSError:
            # Later records go to a new file; reading of this one ends at the damage.
            self._writer.close()
            self._writer = None

    def _next(self, segment: _Segment) -> Record | None:
        try:
            if self._reader is None or self._reader[0] != segment.number:
                if self._reader is not None:
                    self._reader[1].close()
                    self._reader = None
                self._reader = (segment.number, segment.path.open("rb"))
            file = self._reader[1]
            file.seek(segment.read_offset)
            record, size = self._parse(file)
        except OSError as error:
            self._give_up(segment, f"can't be read ({error})")
            return None
        if record is None:
            self._give_up(segment, "is damaged")
            return None
        segment.read_offset += size
        return record

    def _count(self, segment: _Segment, record: Record, change: int) -> None:
        """Count a record as unread (`change` 1) or as read (`change` -1)."""
        size = change * len(record.payload)
        self.unread += change
        self.unread_bytes += size
        segment.unread += change
        segment.unread_bytes += size
        segment.unread_samples += change * record.samples

    def _give_up(self, segment: _Segment, why: str) -> None:
        """Count the unread records of a segment as lost; later records go to a new file."""
        log.warning("%s %s at byte %d; %d messages are lost", segment.path, why, segment.read_offset, segment.unread)
        self.damaged += 1
        self.lost += segment.unread
        self.lost_samples += segment.unread_samples
        self.unread -= segment.unread
        self.unread_bytes -= segment.unread_bytes
        segment.records -= segment.unread
        segment.unread = segment.unread_bytes = segment.unread_samples = 0
        segment.bytes = segment.read_offset
        if self._writer is not None and segment is self._segments[-1]:
            self._writer.close()
            self._writer = None

    def _parse(self, file: BinaryIO) -> tuple[Record | None, int]:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None, 0
        length, crc = _HEAD.unpack(head)
        if length > _MAX_RECORD_BYTES:
            return None, 0
        body = file.read(length)
        if len(body) < length or zlib.crc32(body) != crc:
            return None, 0
        try:
            return self._decoder.decode(body), _HEAD.size + length
        except msgspec.DecodeError:
            return None, 0

    def _load(self, path: Path) -> None:
        """Load a segment of an earlier run: counts its records up to a damaged one, which ends its reading."""
        try:
            number = int(path.stem)
        except ValueError:
            return
        segment = _Segment(number, path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while segment.bytes < size:
                record, length = self._parse(file)
                if record is None:
                    self.damaged += 1
                    log.warning("%s is damaged at byte %d of %d; the rest is lost", path, segment.bytes, size)
                    break
                segment.bytes += length
                segment.records += 1
                self._count(segment, record, 1)
        if segment.records == 0:
            path.unlink(missing_ok=True)
            return
        self._segments.append(segment)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 64).decode(errors="replace").strip()
        os.close(descriptor)
        raise SpillBusy(
            f"another collector (process {owner or 'unknown'}) already works in {path.parent}: "
            "stop it, or give this one another --host or --state"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor
