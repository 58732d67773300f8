"""The outbox: what waits for the bus, bounded in bytes, oldest dropped first, in order.

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
"""Of the bytes that wait, so many at most are kept in memory where there is a spill file."""


class Entry:
    """A message on its way.

    Attributes:
        subject: where it goes.
        message_id: the same each time it is sent.
        payload: likewise.
        samples: device samples in it.
        doubtful: it may have reached the stream so long ago that the stream no longer knows its id.
        sent_at: when it was first sent, by the loop's clock; None if it never was or the bus has refused it since.
        passed: a later one was stored before it, so that the stream's last message says nothing of it.
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
        limit_bytes: of payloads, in memory and on disk together; beyond it the oldest that is not in flight is dropped.
        folder: for the spill file; None keeps everything in memory.

    Attributes:
        dropped_messages: since the start.
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
        """Payload bytes that wait, wherever they are."""
        disk = self._spill.unread_bytes if self._spill is not None else 0
        return self._unsent_bytes + self._in_flight_bytes + self._behind_bytes + disk

    @property
    def in_flight(self) -> int:
        """Messages that were taken and are not done."""
        return len(self._in_flight)

    @property
    def in_flight_bytes(self) -> int:
        """Their payloads."""
        return self._in_flight_bytes

    def __len__(self) -> int:
        disk = self._spill.unread if self._spill is not None else 0
        return len(self._unsent) + len(self._in_flight) + len(self._behind) + disk

    def put(
        self, subject: str, message_id: str, payload: bytes, samples: int = 0, *, beyond_limit: bool = False
    ) -> None:
        """Queue a message behind all others; the oldest are dropped where there is no room.

        Args:
            subject: where it goes.
            message_id: no other's.
            payload: what is limited.
            samples: device samples in it.
            beyond_limit: nothing is dropped for it, but for the next one: a count of what was dropped is still true
                when it is queued.
        """
        entry = Entry(subject, message_id, payload, samples)
        if self._spill is not None and self._goes_to_disk(self._spill):
            self._write(self._spill, entry)
        else:
            self._push(entry)
        if not beyond_limit:
            self._shrink()

    def take(self) -> Entry | None:
        """The next message to send; it is in flight from now on."""
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
        """The bus has it, or will never want it; False where it was not in flight."""
        entry = self._in_flight.pop(message_id, None)
        if entry is None:
            return False
        self._in_flight_bytes -= len(entry.payload)
        if entry.segment and self._spill is not None:
            self._spill.done(entry.segment)
        return True

    def drop(self, message_id: str) -> None:
        """Give up a message that is in flight: the bus refuses it for good."""
        entry = self._in_flight.get(message_id)
        if entry is not None and self.done(message_id):
            self.dropped_messages += 1
            self.dropped_samples += entry.samples

    def refused(self, message_id: str) -> None:
        """The bus has said that it did not store this message."""
        entry = self._in_flight.get(message_id)
        if entry is not None:
            entry.sent_at, entry.doubtful = None, False

    def passed(self, message_id: str) -> None:
        """A later message was stored, and this one was lost on its way, or its acknowledgement was."""
        entry = self._in_flight.get(message_id)
        if entry is not None:
            entry.passed = True

    def rewind(self) -> None:
        """Whatever is in flight is to be sent again, first and in the same order."""
        for entry in reversed(self._in_flight.values()):
            self._unsent.appendleft(entry)
            self._unsent_bytes += len(entry.payload)
        self._in_flight.clear()
        self._in_flight_bytes = 0

    def spill(self) -> None:
        """The bus is away: put on disk what is in memory, and what comes from now on."""
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
        """The bus is back: what comes from now on may wait in memory."""
        self._spilling = False

    def close(self, *, keep: bool = True) -> int:
        """Put on disk what is left and let go of the file.

        Args:
            keep: False forgets what this run has put in; what an earlier one has left stays on disk.

        Returns:
            Messages that are on no disk, and lost.
        """
        if keep and len(self):
            self.spill()
        waiting = (*self._in_flight.values(), *self._unsent, *self._behind)
        lost = sum(not entry.segment for entry in waiting)
        if self._spill is not None:
            self._spill.close(keep=keep)
        return lost

    def _goes_to_disk(self, spill: Spill) -> bool:
        # Once something is unread on disk, whatever comes later has to queue behind it there.
        return self._spilling or bool(spill.unread or self._behind) or self._unsent_bytes > self._memory_bytes

    def _write(self, spill: Spill, entry: Entry) -> None:
        """Put a message at the end of the file; where the disk takes none, in memory behind it."""
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
        """Put at the end of the file what waits behind it, one by one: a disk that is full still costs little.

        Raises:
            OSError: the first of what is left was not written.
        """
        while self._behind:
            spill.append([_record(self._behind[0])])
            self._behind_bytes -= len(self._behind.popleft().payload)

    def _push_behind(self, entry: Entry) -> None:
        self._behind.append(entry)
        self._behind_bytes += len(entry.payload)

    def _persist(self, spill: Spill) -> None:
        """Write what is in memory alone: it stands in front of all that will be unread in the file.

        Raises:
            OSError: nothing of it was written.
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
        """Take into memory what is next: from the file, then what waits behind it."""
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
        # What an earlier run has written may have been sent by it.
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
