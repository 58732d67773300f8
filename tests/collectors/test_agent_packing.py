"""Ticks become messages without losing or moving a value, and stand on a grid of times."""

from __future__ import annotations

from corral.collectors.agent.agent import Agent
from corral.collectors.agent.outbox import Outbox
from corral.collectors.agent.pacing import Pace
from corral.collectors.agent.packing import Packer
from corral.collectors.agent.publisher import _number
from corral.collectors.source import Tick
from corral.schemas import columns
from corral.schemas.metrics import METRICS, DeviceSample
from corral.schemas.telemetry import AgentReport
from hypothesis import given
from hypothesis import strategies as st

NAMES = ("gpu_utilization_percent", "memory_used_bytes", "performance_state")


@st.composite
def readings(draw: st.DrawFn) -> list[list[tuple[str, list[str], dict[str, list[int | None]]]]]:
    """Some readings of hosts `a` and `b`, with devices and metrics that come and go."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        reading = []
        for host in draw(st.lists(st.sampled_from("ab"), max_size=3)):
            devices = [f"{host}{n}" for n in range(draw(st.integers(0, 3)))]
            values = {
                name: draw(st.lists(st.none() | st.integers(0, 15), min_size=len(devices), max_size=len(devices)))
                for name in draw(st.sets(st.sampled_from(NAMES)))
            }
            reading.append((host, devices, values))
        found.append(reading)
    return found


@given(readings(), st.integers(1, 4), st.integers(20, 400))
def test_every_sample_comes_out_once_and_in_order(given_readings: list, per_batch: int, max_bytes: int) -> None:
    packer = Packer(per_batch, max_bytes)
    expected: dict[str, list[DeviceSample]] = {"a": [], "b": []}
    packs = []
    time_ns = 0
    for reading in given_readings:
        ticks = []
        for host, devices, values in reading:
            time_ns += 1
            packed = {name: columns.pack(METRICS[name], column) for name, column in values.items() if devices}
            ticks.append(
                Tick(
                    host=host,
                    devices=devices,
                    times_ns=columns.pack_times([time_ns] * len(devices)),
                    columns={name: column[0] for name, column in packed.items() if column},
                    nulls={name: column[1] for name, column in packed.items() if column and column[1]},
                )
            )
            for at, device in enumerate(devices):
                metrics = {name: column[at] for name, column in values.items()}
                expected[host].append(DeviceSample(host=host, device=device, time_ns=time_ns, **metrics))
        packs += packer.add(ticks)
    packs += packer.flush()
    found: dict[str, list[DeviceSample]] = {"a": [], "b": []}
    for number, pack in enumerate(packs):
        batch = pack.batch("agent", number, "test")
        columns.check(batch)
        rows = list(columns.rows(batch))
        assert pack.samples == len(rows)
        assert len(pack.ticks) == 1 or pack.bytes <= max_bytes
        found[pack.host] += rows
    assert found == expected


@given(st.lists(st.floats(0, 5), max_size=60), st.sampled_from([0.02, 0.25, 1.0]))
def test_ticks_stand_on_the_grid_and_late_ones_are_counted_not_made_up(durations: list[float], interval: float) -> None:
    pace = Pace(100.0, interval)
    now, begun = 100.0, []
    for duration in durations:
        begun.append(round((pace.due - 100.0) / interval, 6))
        now = max(now, pace.due) + duration
        now += pace.next(now)
    # Whole numbers, each at most once, and those left out are the late ones.
    numbers = [round(at) for at in begun]
    assert numbers == begun
    assert numbers == sorted(set(numbers))
    if numbers:
        next_number = round((pace.due - 100.0) / interval)
        assert pace.late == next_number - len(numbers)
        assert pace.due + interval > now - 1e-6


def test_nobody_can_tell_the_id_of_a_collectors_next_message() -> None:
    """A stream stores an id once, whoever sends it; the publisher still finds run and number in it."""
    outbox = Outbox(2**20)

    class Put:
        id, _outbox = "run", outbox

    for number in (7, 8):
        Agent._put(Put(), "s", AgentReport(host="h", agent="run", sequence=number, time_ns=1), sequence=number)  # type: ignore[arg-type]
    first, second = (entry.message_id for _ in range(2) if (entry := outbox.take()) is not None)
    assert [_number(found) for found in (first, second)] == [("run", 7), ("run", 8)]
    assert first.partition(".")[0] != second.partition(".")[0]
    assert len(first.partition(".")[0]) >= 16
    assert _number("run-9") == ("run", 9), "an older outbox has none"
