"""A stream of samples that can be read again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from corral.processors.ingest.columnar import Decoder, Incoming
from corral.processors.storage import Batch, Database
from corral.schemas import codec, subjects
from support.history import sample_batch


class Feed:
    """A stream of samples: stored by sequence, and asked for again after a recovery."""

    def __init__(self) -> None:
        self.messages: list[Incoming] = []

    def publish(self, count: int, *, ago_days: float = 0.0, ticks: int = 200, devices: int = 16) -> None:
        start = datetime.now(UTC) - timedelta(days=ago_days)
        base = int(start.timestamp()) * 10**9 - count * ticks * 10**8
        for _ in range(count):
            sequence = len(self.messages) + 1
            batch = sample_batch("h1", sequence, devices=devices, ticks=ticks, start_ns=base, step_ns=10**8, noisy=True)
            base += ticks * 10**8
            self.messages.append(Incoming(subjects.samples_subject("h1"), codec.encode(batch), sequence, None))

    def store(self, database: Database) -> None:
        """As ingest does: behind what is stored, from the start where nothing is said to be."""
        after = database.resume("T", "once")
        decoder = Decoder(database.series)
        for message in self.messages[after:]:
            table, _, refused = decoder.decode([message], lambda *_: True, 2**62)
            assert not refused
            database.commit(Batch(stream="T", sequence=message.sequence, samples=table))
