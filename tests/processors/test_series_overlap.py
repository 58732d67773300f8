"""Devices that the next batch makes known while one is being committed."""

from __future__ import annotations

import time
from pathlib import Path

from corral.processors.ingest.columnar import Decoder, Incoming
from corral.processors.storage import Database
from corral.processors.storage.protocol import Batch
from corral.schemas import codec, subjects
from duckdb import DuckDBPyConnection
from support.history import sample_batch


class Overlapped(Database):
    """Decodes the batch of another host once each commit is under way, as ingest does in a thread of its own."""

    decoded: list[Batch]

    def decode(self, sequence: int) -> Batch:
        host = f"h{sequence}"
        message = Incoming(subjects.samples_subject(host), codec.encode(sample_batch(host, sequence)), sequence, None)
        table, _, refused = Decoder(self.series).decode([message], lambda *_: True, time.time_ns())
        assert not refused
        return Batch(stream=subjects.TELEMETRY_STREAM, sequence=sequence, samples=table, messages=1)

    def _cursor_for_writing(self) -> DuckDBPyConnection:
        self.decoded.append(self.decode(self.decoded[-1].sequence + 1))
        return super()._cursor_for_writing()


def test_each_device_is_stored_once_with_the_batch_that_brought_it(tmp_path: Path) -> None:
    database = Overlapped(tmp_path / "history.duckdb")
    database.decoded = [database.decode(1)]
    for at in range(3):
        database.commit(database.decoded[at])
    # What was only decoded is not in it.
    stored = "SELECT count(*), count(DISTINCT (host, device)), max(host) FROM store.series"
    assert database.cursor().execute(stored).fetchall() == [(12, 12, "h3")]
    database.close()

    again = Database(tmp_path / "history.duckdb")
    each = "SELECT host, count(*), count(DISTINCT device) FROM samples GROUP BY ALL ORDER BY host"
    assert again.cursor().execute(each).fetchall() == [(f"h{number}", 12, 4) for number in (1, 2, 3)]
    assert again.series.names == [(f"h{number}", f"GPU-h{number}-{at}") for number in (1, 2, 3) for at in range(4)]
    again.close()
