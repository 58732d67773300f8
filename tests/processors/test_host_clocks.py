"""Hosts whose clock is wrong: their times are set right the same way each time, and they are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from corral.processors.ingest import facts
from corral.processors.ingest.columnar import Decoder, Incoming
from corral.processors.ingest.deduplication import Arrivals
from corral.processors.ingest.hostclocks import HostClocks
from corral.processors.ingest.ingest import CONSUMERS, Ingest
from corral.processors.storage.protocol import Arrival, Series
from corral.schemas import codec, subjects
from corral.schemas.telemetry import DeviceEvent, SampleBatch
from corral.schemas.values import clocks
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

S = 10**9
NOW = 1_800_000_000 * S
AHEAD = clocks.AHEAD_SECONDS


def message(sequence: int, times_ns: list[int], stored_ns: int, host: str = "h1") -> Incoming:
    batch = SampleBatch(
        host=host, agent="a", sequence=sequence, source="nvml", devices=["GPU-0"],
        times_ns=np.array(times_ns, "<i8").tobytes(), columns={"power_watts": np.ones(len(times_ns), "<f4").tobytes()},
    )  # fmt: skip
    return Incoming(subjects.samples_subject(host), codec.encode(batch), sequence, None, stored_ns)


def decoded(messages: list[Incoming], found: HostClocks | None = None) -> list[int]:
    table, _, refused = Decoder(Series(), found).decode(messages, Arrivals().is_new, 0)
    assert not refused
    assert table is not None
    return [value.value for value in table["time"].combine_chunks()]


@given(st.integers(-400 * 86400, 400 * 86400), st.integers(0, 3600), st.integers(1, 5))
def test_no_sample_is_dated_ahead_and_each_is_set_right_by_the_same(offset: int, waited: int, ticks: int) -> None:
    """Whatever the clock and however long a message waited, and however often it is delivered."""
    stored = NOW + waited * S
    given_ns = [NOW + offset * S - at * S for at in reversed(range(ticks))]
    once = decoded([message(1, given_ns, stored)])
    assert once == decoded([message(7, [NOW], NOW), message(1, given_ns, stored)])[1:]
    assert max(once) <= (stored + int(AHEAD * S)) // 1000
    if given_ns[-1] <= stored + AHEAD * S:
        assert once == [time // 1000 for time in given_ns]
    else:
        assert once[-1] == stored // 1000
        event = DeviceEvent(host="h1", agent="a", sequence=1, time_ns=given_ns[-1], kind="x")
        body = Incoming(subjects.events_subject("h1"), codec.encode(event), 1, None, stored)
        [row] = facts.decode([body], Arrivals().is_new, 0).tables()["events"].to_pylist()
        assert [int(row[name].timestamp() * 1e6 + 0.5) for name in ("time", "stored")] == [stored // 1000] * 2


def test_a_clock_that_is_set_within_a_message_leaves_what_was_right() -> None:
    times = [NOW + 3600 * S, NOW + 3601 * S, NOW + 2 * S]
    assert decoded([message(1, times, NOW + 2 * S)]) == [at // 1000 for at in (NOW + S, NOW + 2 * S, NOW + 2 * S)]


def judged(offsets: list[float], every: float = 1.0) -> dict[str, tuple[float, bool]]:
    """What is known after messages with these offsets, one every so many seconds."""
    found = HostClocks()
    stored = {}
    for at, offset in enumerate(offsets):
        stored_ns = NOW + int(at * every * S)
        newest_ns = stored_ns + int(offset * S)
        if abs(offset) > AHEAD or found.watches("h1"):
            found.observe("h1", newest_ns, stored_ns)
        stored |= {clock.host: clock for clock in found.take_changed()}
    return {host: (clock.offset_seconds, clock.until_ns is None) for host, clock in stored.items()}


@given(st.floats(AHEAD + 1, 1e6), st.floats(0, 0.5))
def test_wrong_clocks_are_named_and_right_ones_cleared(off: float, jitter: float) -> None:
    assert judged([off]) == {"h1": (pytest.approx(off, abs=1e-6), True)}
    behind = [-off - jitter * (at % 2) for at in range(20)]
    assert judged(behind) == {"h1": (pytest.approx(-off, abs=1e-3), True)}
    for wrong in ([off] * 20, behind):
        assert judged([*wrong, *[-0.01] * 25])["h1"][1] is False


@given(st.floats(AHEAD + 10, 1e5), st.lists(st.floats(0, 8), min_size=50, max_size=100))
def test_a_clock_that_is_ahead_is_told_seldom_however_long_its_messages_take(off: float, ways: list[float]) -> None:
    found, told = HostClocks(), 0
    for at, way in enumerate(ways):
        stored_ns = NOW + int(at * 0.25 * S)
        found.observe("h1", stored_ns + int((off - way) * S), stored_ns)
        for clock in found.take_changed():
            told += 1
            assert off - 8.001 <= clock.offset_seconds <= off + 1e-6
    # It rises by a second at least each time, and may fall once in a window.
    assert told <= 1 + 8 + 3 * 9


@given(st.floats(20, 1e5), st.floats(1.5, 100))
def test_a_backlog_is_no_wrong_clock(waited: float, speed: float) -> None:
    """What was kept while the bus was away comes faster than it was read."""
    every = 0.5
    late = [-max(0.0, waited - at * every * (speed - 1)) for at in range(400)]
    assert judged(late, every) == {}


def test_the_count_of_a_run_is_each_hosts_own() -> None:
    arrivals = Arrivals([Arrival("old", 10, 0b1011)])
    assert [arrivals.is_new("h1", "a", number) for number in (1, 2, 2)] == [True, True, False]
    assert arrivals.is_new("h2", "a", 10**12)
    assert arrivals.is_new("h1", "a", 3)
    assert not arrivals.is_new("h1", "a", 3)
    # What an older Corral stored holds for whoever goes on with the run.
    assert [arrivals.is_new("h1", "old", number) for number in (10, 9, 8, 7, 11)] == [False, False, True, False, True]
    again = Arrivals(arrivals.take_changed())
    assert [again.is_new("h1", agent, number) for agent, number in (("a", 3), ("a", 4), ("old", 11))] == [
        False, True, False,
    ]  # fmt: skip


class Nowhere:
    """As much of a storage as decoding needs."""

    processor = "p"

    def __init__(self) -> None:
        self.series = Series()


async def test_what_is_decoded_once_more_in_parts_takes_nothing_of_the_batches_after_it() -> None:
    async def no_streams() -> None:
        return

    storage: Any = Nowhere()
    letters: Any = None
    ingest = Ingest(Client(), storage, CONSUMERS[0], letters, no_streams)
    early, late = NOW + 3600 * S, NOW + 9 * S
    first, _, _ = ingest._decode([message(1, [early], NOW), message(2, [early], NOW)])
    assert [clock.host for clock in first.clocks] == ["h1"]
    # The next batch is on its way while the first is refused.
    assert ingest._arrivals.is_new("h2", "a", 1)
    part, _, _ = ingest._decode([message(1, [early], NOW)], first)
    assert (part.sequence, part.arrivals, part.clocks) == (1, first.arrivals, first.clocks)
    following, _, _ = ingest._decode([message(3, [late], late)])
    assert {run.agent for run in following.arrivals} == {"h1/a", "h2/a"}
