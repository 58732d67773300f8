"""Batches of samples for the tests of DuckDB's log."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from corral.processors.ingest.columnar import Decoder, Incoming
from corral.processors.storage import Batch, Database
from corral.schemas import codec, subjects
from support.history import sample_batch

MIDNIGHT = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


START_NS = int((MIDNIGHT - timedelta(days=3)).timestamp()) * 10**9


def samples(history: Database, sequence: int, start_ns: int, devices: int = 4, ticks: int = 20) -> Batch:
    message = sample_batch("h1", sequence, devices=devices, ticks=ticks, start_ns=start_ns, noisy=True)
    incoming = Incoming(subjects.samples_subject("h1"), codec.encode(message), sequence)
    table, _, refused = Decoder(history.series).decode([incoming], lambda *_: True, time.time_ns())
    assert not refused
    return Batch(stream="S", sequence=sequence, samples=table, messages=1)
