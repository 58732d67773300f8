"""Counters with temporarily wrong readings in the exporter, compared with an independent model."""

from __future__ import annotations

from collections.abc import Sequence

from corral.exporter.counters import CounterState, filter_counters
from corral.schemas import columns
from corral.schemas.counters import Held, hold
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import SampleBatch
from hypothesis import given
from hypothesis import strategies as st

BASE = 22_543_283_000


def batch(at: int, **values: Sequence[int | None]) -> SampleBatch:
    packed = {name: columns.pack(METRICS[name], found) for name, found in values.items()}
    return SampleBatch(
        host="h",
        agent="a",
        sequence=at + 1,
        source="nvml",
        devices=[f"GPU-{number}" for number in range(len(next(iter(values.values()))))],
        times_ns=columns.pack_times([at * 10**9] * len(next(iter(values.values())))),
        columns={name: column[0] for name, column in packed.items() if column is not None},
        nulls={name: column[1] for name, column in packed.items() if column is not None and column[1] is not None},
    )


def shown(readings: Sequence[tuple[int, int | None]], metric: str = "energy_millijoules") -> list[float | None]:
    """What a page says of one device at each of these seconds, another one growing steadily beside it."""
    counters: dict[str, CounterState] = {}
    found: list[float | None] = []
    for at, value in readings:
        made = filter_counters(batch(at, **{metric: [value, BASE + at]}), counters, float(at))
        column = columns.column(made, metric)
        assert column is not None
        assert column[1] == BASE + at
        found.append(column[0])
    return found


def test_a_reading_that_passes_is_never_shown() -> None:
    ramp = [BASE + 52_000 * at for at in range(10)]
    for wrong in (0, 200_000, ramp[4] - 1, 2**32 - 1, 2**50):
        readings = [*ramp[:5], wrong, wrong, *ramp[7:]]
        assert shown(list(enumerate(readings))) == [*ramp[:5], ramp[4], ramp[4], *ramp[7:]], wrong
    assert shown([(0, 5), (1, None), (2, 0), (3, None), (4, 6)]) == [5, None, 5, None, 6]


def test_a_reset_is_shown_once_it_has_stood_and_at_once_after_a_silence() -> None:
    stood = shown([(0, BASE), *[(at, 52_000 * at) for at in range(1, 200)]])
    since = next(at for at, value in enumerate(stood) if value != BASE)
    assert since == 122
    assert stood[since:] == [52_000 * at for at in range(since, 200)]
    assert shown([(0, BASE), (300, 1000), (301, 53_000)]) == [BASE, 1000, 53_000]


def test_what_stays_lower_or_higher_and_is_no_reset_adds_nothing_and_goes_on_from_there() -> None:
    """As rollups have it; Prometheus would add the whole life of the counter where its series falls."""
    ecc, hour = "ecc_corrected_volatile_count", range(0, 3600, 10)
    assert shown([(at, 1000 if at < 600 else 999) for at in hour], ecc) == [1000] * len(hour)
    assert shown([(0, 1000), (10, 999), (400, 1001)], ecc)[-1] in (1001, 1002)
    after = shown([(at, 1000 if at < 600 else 990 if at < 1800 else 995) for at in hour], ecc)
    assert (after[-1], sorted(v for v in after if v is not None)) == (1005, after)
    # Set back to 0 for good, by a driver that is loaded anew.
    assert shown([(at, 1000 if at < 600 else 3) for at in hour], ecc)[-1] == 3
    for odd in (BASE // 2 + 1, BASE - 1, BASE + 10**15):
        found = shown([(at, (BASE if at < 60 else odd) + 100_000 * at) for at in range(0, 900, 10)])
        known = [v for v in found if v is not None]
        assert known == sorted(known), odd
        grown = known[-1] - known[0]
        assert abs(grown - 100_000 * 890) <= 100_000 * 20, odd


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, 0, 1, 7, 8, BASE, BASE + 1, 2**50])), max_size=40))
def test_many_at_once_are_what_each_would_be_alone(steps: list[tuple[int, int | None]]) -> None:
    at, readings = 0, list[tuple[int, int | None]]()
    for step, value in steps:
        at += 40**step
        readings.append((at, value))
    believed: Held | None = None
    expected: list[float | None] = []
    for at, value in readings:
        if value is not None:
            believed = hold(believed, METRICS["energy_millijoules"], value, float(at))
        expected.append(None if value is None or believed is None else believed.value)
    assert shown(readings) == expected
