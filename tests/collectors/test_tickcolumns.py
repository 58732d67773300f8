"""Columns kept from tick to tick: whatever comes and goes, a receiver reads the last values."""

from __future__ import annotations

from corral.collectors.agent.tickcolumns import INDEX, NAMES, TickColumns
from corral.schemas import columns
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import SampleBatch
from hypothesis import given
from hypothesis import strategies as st

SOME = ("power_watts", "memory_used_bytes", "sm_clock_megahertz", "throttle_reasons_bitmask", "fan_percent")
VALUE = {
    name: st.none()
    | (st.integers(0, 2**31 - 1) if METRICS[name].integer else st.integers(0, 100) | st.floats(0, 100, width=32))
    for name in SOME
}


@given(st.data())
def test_a_receiver_reads_the_last_values(data: st.DataObject) -> None:
    kept = TickColumns()
    for _ in range(data.draw(st.integers(1, 3))):
        count = data.draw(st.integers(1, 4))
        kept.relaid(count)
        rows: list[list[float | int | None]] = [[None] * len(NAMES) for _ in range(count)]
        for _ in range(data.draw(st.integers(1, 4))):
            read = data.draw(st.sets(st.sampled_from(SOME)))
            for name in read:
                for row in rows:
                    row[INDEX[name]] = data.draw(VALUE[name])
            kept.update(rows, [INDEX[name] for name in read])
            batch = SampleBatch(
                host="h",
                agent="a",
                sequence=1,
                source="nvml",
                devices=[f"d{i}" for i in range(count)],
                times_ns=columns.pack_times([1] * count),
                columns=kept.columns,
                nulls=kept.nulls,
            )
            columns.check(batch)
            for name in SOME:
                last = [row[INDEX[name]] for row in rows]
                found = columns.column(batch, name)
                assert (None if found is None else list(found)) == (None if set(last) == {None} else last)
