"""The outbox: an ordered queue of messages for the bus, bounded in bytes, which drops the oldest first.

Messages wait in memory while the bus takes them. Once it does not (`spill`), they are written to the spill file too,
so that they outlive the agent, and new ones go to the file alone. Where the disk takes no more, the newest wait in
memory behind the file. A message leaves when the bus has acknowledged it.

    put ──► [ unsent, in memory ] ──take──► [ in flight ] ──done──► gone
       ├──► [ spill file ] ──┤ ◄─────────────── rewind
       └──► [ behind it ] ───┘
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path
from typing import Final

from .spill import Record, Spill

log = logging.getLogger("corral.collector")

READ_AHEAD_BYTES: Final = 2**20
MEMORY_BYTES: Final = 8 * 2**20
"""Most payload bytes that wait in memory where there is a spill file."""


class Entry:
    """A message in the outbox.

    Attributes:
        subject: subject to publish it on.
        message_id: message id, the same each time it is sent.
        payload: body, the same each time it is sent.
        samples: number of device samples in it.
        doubtful: True if it may have reached the stream so long ago that deduplication no longer covers its id.
        sent_at: when it was first sent, by the loop's clock; None if it never was or the bus has refused it since.
        passed: True if a later one was stored before it, so that the stream's last message does not tell whether this
            one was stored.
    """

    __slots__ = ("doubtful", "message_id", "passed", "payload", "samples", "segment", "sent_at", "subject")

    def __init__(
        self, subject: str, message_id: str, payload: bytes, samples: int, segment: int = 0, doubtful: bool = False
    ) -> None:
        self.subject = subject
        self.message_id = message_id
        self.payload = payload
        self.samples = samples
        self.segment = segment
        self.doubtful = doubtful
        self.sent_at: float | None = None
        self.passed = False


class Outbox:
    """A bounded queue of messages that may outlive the process.

    Args:
        limit_bytes: limit of payload bytes in memory and on disk; beyond it the oldest that is not in flight is
            dropped.
        folder: folder of the spill file; None keeps everything in memory.

    Attributes:
        dropped_messages: messages dropped since the start.
        dropped_samples: device samples in them.

    Raises:
        SpillBusy: another agent uses the folder.
        OSError: the folder can't be used.
    """

    def __init__(self, limit_bytes: int, folder: Path | None = None, *, memory_bytes: int = MEMORY_BYTES) -> None:
        if limit_bytes <= 0:
            raise ValueError(f"a buffer of {limit_bytes} bytes holds nothing: give it at least a few MiB")
        self.limit_bytes = limit_bytes
        self.dropped_messages = 0
        self.dropped_samples = 0
        self._memory_bytes = min(memory_bytes, limit_bytes)
        self._unsent: deque[Entry] = deque()
        self._unsent_bytes = 0
        self._behind: deque[Entry] = deque()
        self._behind_bytes = 0
        self._in_flight: dict[str, Entry] = {}
        self._in_flight_bytes = 0
        self._spilling = False
        self._spill = Spill(folder) if folder is not None else None
        self._disk_failed = False
        self._shrink()

    @property
    def bytes(self) -> int:
        """Payload bytes that wait, in memory, in flight and on disk."""
        disk = self._spill.unread_bytes if self._spill is not None else 0
        return self._unsent_bytes + self._in_flight_bytes + self._behind_bytes + disk

    @property
    def in_flight(self) -> int:
        """Number of messages in flight: taken and not done."""
        return len(self._in_flight)

    @property
    def in_flight_bytes(self) -> int:
        """Payload bytes of the messages in flight."""
        return self._in_flight_bytes

    def __len__(self) -> int:
        disk = self._spill.unread if self._spill is not None else 0
        return len(self._unsent) + len(self._in_flight) + len(self._behind) + disk

    def put(
        self, subject: str, message_id: str, payload: bytes, samples: int = 0, *, beyond_limit: bool = False
    ) -> None:
        """Queue a message behind all others; drops the oldest where there is no room.

        Args:
            subject: subject to publish it on.
            message_id: unique message id.
            payload: body; its bytes count toward the limit.
            samples: number of device samples in it.
            beyond_limit: True to drop nothing for it, only for the next message: a count of drops in its body is then
                still true once it is queued.
        """
        entry = Entry(subject, message_id, payload, samples)
        if self._spill is not None and self._goes_to_disk(self._spill):
            self._write(self._spill, entry)
        else:
            self._push(entry)
        if not beyond_limit:
            self._shrink()

    def take(self) -> Entry | None:
        """Take the next message to send, which is in flight from now on; None if none waits."""
        if not self._unsent:
            self._refill(READ_AHEAD_BYTES)
        if not self._unsent:
            return None
        entry = self._unsent.popleft()
        self._unsent_bytes -= len(entry.payload)
        self._in_flight[entry.message_id] = entry
        self._in_flight_bytes += len(entry.payload)
        return entry

    def done(self, message_id: str) -> bool:
        """Remove a message that the bus has stored or is never to get; False where it was not in flight."""
        entry = self._in_flight.pop(message_id, None)
        if entry is None:
            return False
        self._in_flight_bytes -= len(entry.payload)
        if entry.segment and self._spill is not None:
            self._spill.done(entry.segment)
        return True

    def drop(self, message_id: str) -> None:
        """Drop a message in flight that the bus refuses for good, and count it."""
        entry = self._in_flight.get(message_id)
        if entry is not None and self.done(message_id):
            self.dropped_messages += 1
            self.dropped_samples += entry.samples

    def refused(self, message_id: str) -> None:
        """Record that the bus did not store a message in flight, so that it can't be a duplicate when sent again."""
        entry = self._in_flight.get(message_id)
        if entry is not None:
            entry.sent_at, entry.doubtful = None, False

    def passed(self, message_id: str) -> None:
        """Record that a later message was stored, and that this one or its acknowledgement was lost."""
        entry = self._in_flight.get(message_id)
        if entry is not None:
            entry.passed = True

    def rewind(self) -> None:
        """Put the messages in flight back to the front, in the same order, to be sent again."""
        for entry in reversed(self._in_flight.values()):
            self._unsent.appendleft(entry)
            self._unsent_bytes += len(entry.payload)
        self._in_flight.clear()
        self._in_flight_bytes = 0

    def spill(self) -> None:
        """Write to disk what is in memory, and new messages from now on: the bus is away."""
        self.rewind()
        self._spilling = True
        if self._spill is None:
            return
        try:
            self._persist(self._spill)
            self._persist_behind(self._spill)
        except OSError as error:
            self._disk_trouble(error)

    def unspill(self) -> None:
        """Let new messages wait in memory again: the bus is back."""
        self._spilling = False

    def close(self, *, keep: bool = True) -> int:
        """Write to disk what is left, and close the spill file.

        Args:
            keep: False discards what this run has queued; messages of earlier runs stay on disk.

        Returns:
            Number of messages that are not on disk, and so lost.
        """
        if keep and len(self):
            self.spill()
        waiting = (*self._in_flight.values(), *self._unsent, *self._behind)
        lost = sum(not entry.segment for entry in waiting)
        if self._spill is not None:
            self._spill.close(keep=keep)
        return lost

    def _goes_to_disk(self, spill: Spill) -> bool:
        # While messages are unread on disk, new ones have to queue behind them there.
        return self._spilling or bool(spill.unread or self._behind) or self._unsent_bytes > self._memory_bytes

    def _write(self, spill: Spill, entry: Entry) -> None:
        """Append a message to the spill file; where the disk takes none, keep it in memory behind the file."""
        try:
            self._persist(spill)
            self._persist_behind(spill)
            spill.append([_record(entry)])
        except OSError as error:
            self._disk_trouble(error)
            if spill.unread or self._behind:
                self._push_behind(entry)
            else:
                self._push(entry)

    def _persist_behind(self, spill: Spill) -> None:
        """Append to the file the messages that wait behind it, one by one: a try on a full disk then costs little.

        Raises:
            OSError: the first of the messages that are left was not written.
        """
        while self._behind:
            spill.append([_record(self._behind[0])])
            self._behind_bytes -= len(self._behind.popleft().payload)

    def _push_behind(self, entry: Entry) -> None:
        self._behind.append(entry)
        self._behind_bytes += len(entry.payload)

    def _persist(self, spill: Spill) -> None:
        """Write the messages that are only in memory; they precede all that will be unread in the file.

        Raises:
            OSError: none of them was written.
        """
        fresh = [entry for entry in (*self._in_flight.values(), *self._unsent) if not entry.segment]
        if not fresh:
            return
        assert not spill.unread, "what is only in memory would come behind the file"
        segments = spill.append([_record(entry) for entry in fresh], read=True)
        for entry, segment in zip(fresh, segments, strict=True):
            entry.segment = segment

    def _push(self, entry: Entry) -> None:
        self._unsent.append(entry)
        self._unsent_bytes += len(entry.payload)

    def _refill(self, limit_bytes: int) -> None:
        """Load the next messages into memory: from the file, then those that wait behind it."""
        found = self._read(self._spill, limit_bytes) if self._spill is not None and self._spill.unread else ()
        for entry in found:
            self._push(entry)
        if not found:
            self._unsent.extend(self._behind)
            self._unsent_bytes += self._behind_bytes
            self._behind.clear()
            self._behind_bytes = 0

    def _read(self, spill: Spill, limit_bytes: int) -> list[Entry]:
        lost, lost_samples = spill.lost, spill.lost_samples
        found = spill.read(limit_bytes)
        self.dropped_messages += spill.lost - lost
        self.dropped_samples += spill.lost_samples - lost_samples
        # Messages that an earlier run has written may have been sent by it.
        return [
            Entry(
                record.subject,
                record.message_id,
                record.payload,
                record.samples,
                segment,
                doubtful=segment < spill.first_own,
            )
            for segment, record in found
        ]

    def _shrink(self) -> None:
        while self._behind_bytes > self._memory_bytes:
            oldest = self._behind.popleft()
            self._behind_bytes -= len(oldest.payload)
            self._count_drop(oldest)
        while self.bytes > self.limit_bytes:
            if not self._unsent:
                self._refill(1)
            if not self._unsent:
                return
            entry = self._unsent.popleft()
            self._unsent_bytes -= len(entry.payload)
            if entry.segment and self._spill is not None:
                self._spill.done(entry.segment)
            self._count_drop(entry)

    def _count_drop(self, entry: Entry) -> None:
        self.dropped_messages += 1
        self.dropped_samples += entry.samples

    def _disk_trouble(self, error: OSError) -> None:
        if not self._disk_failed:
            log.error(
                "the spill file can't be written (%s): new messages wait in memory, the newest %.3g MiB at most",
                error,
                self._memory_bytes / 2**20,
            )
        self._disk_failed = True


def _record(entry: Entry) -> Record:
    return Record(entry.subject, entry.message_id, entry.samples, entry.payload)
