"""Estimates of durations and of starts, against what they are made of."""

from __future__ import annotations

import math
import random

import corral.planner.fleet.fleet as fold
import pytest
from corral.planner.broker.waiting.estimates import Estimator
from corral.planner.broker.waiting.forecasts import Forecaster
from corral.planner.broker.waiting.queue import WaitingQueue
from corral.planner.fleet.fleet import Fleet
from corral.planner.placement.decide import Policies
from corral.planner.placement.policies import DEFAULT, make
from corral.planner.queue.durations import KNOTS, Durations, Estimate, Guesses, Kind, given, survival_quantiles, unknown
from corral.planner.queue.forecast import Calibration, Forecast, forecast, forecasts
from corral.planner.queue.free_devices import FreeDevices
from corral.planner.queue.line import Line
from corral.planner.queue.order import fifo
from corral.planner.simulation.jobs import Job
from corral.planner.simulation.simulate import fleet_of as fleet_of_nodes
from corral.planner.simulation.timed import replay
from corral.planner.simulation.trace import Node
from corral.schemas.requests import Rejection, RejectionCode, WorkRequest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st
from support.planner_world import MIB, NOW, fleet_of, inventory, processes

counts = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])
leases = st.lists(st.tuples(st.floats(1, 1e6), st.sampled_from([0.25, 1.0]), st.booleans()), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@cases(leases)
def test_quantiles_are_where_the_product_of_survivals_falls(found: list[tuple[float, float, bool]]) -> None:
    quantiles = survival_quantiles(found)
    assert list(quantiles) == sorted(quantiles)
    times = sorted({seconds for seconds, _, ended in found if ended})
    for probability, quantile in zip(KNOTS, quantiles, strict=True):
        # By the definition: at each time the part of those still at risk that ended then, whatever the order.
        alive = 1.0
        reached = None
        for at in times:
            risk = sum(weight for seconds, weight, _ in found if seconds >= at)
            alive *= 1 - sum(weight for seconds, weight, ended in found if ended and seconds == at) / risk
            if alive <= 1 - probability + 1e-9:
                reached = at
                break
        if reached is not None:
            assert quantile == pytest.approx(reached)
        else:
            assert quantile >= max(times, default=0.0)


@settings(deadline=None, max_examples=30)
@cases(leases, st.floats(0, 2e6), st.sampled_from([0.1, 0.5, 0.9]))
def test_what_remains_at_an_age_is_the_quantile_among_those_that_are_older(
    found: list[tuple[float, float, bool]], age: float, probability: float
) -> None:
    estimate = Estimate(survival_quantiles(found), "all", len(found))
    left = estimate.remaining(age, probability)
    levels = [at / 2000 for at in range(1, 2000)]
    older = [length for level in levels if (length := estimate.quantile(level)) > age]
    if len(older) > 200:
        brute = older[int(probability * len(older))] - age
        assert left == pytest.approx(brute, rel=0.1, abs=0.02 * age + 2.0)
    assert estimate.remaining(age, 0.9) >= estimate.remaining(age, 0.1) >= 0


def test_estimates_come_from_the_most_specific_group_and_running_leases_count_as_longer() -> None:
    known = Durations()
    mine, other = Kind("ann", "train", 8), Kind("bob", "train", 4)
    assert known.estimate(mine, 0.0).basis == "unknown"
    for number in range(4):
        known.started(number, other, 0.0)
        known.ended(number, other, 100.0 + number)
    assert (known.estimate(mine, 200.0).basis, known.estimate(mine, 200.0).count) == ("name", 4)
    assert known.estimate(Kind("cid", "", 8), 200.0).basis == "all"
    for number in range(10, 14):
        known.started(number, mine, 0.0)
        known.ended(number, mine, 1000.0)
    assert (known.estimate(mine, 2000.0).basis, known.estimate(mine, 2000.0).seconds) == ("owner_name", 1000.0)
    for number in range(20, 24):
        known.started(number, mine, 0.0)
    for number in range(30, 34):
        known.started(number, mine, 3000.0)
        known.ended(number, mine, 3900.0)
    assert known.estimate(mine, 9000.0).quantile(0.9) > 1000.0
    assert known.estimate(mine, 9000.0, limit=500.0).seconds == 500.0


def test_guesses_are_trusted_as_far_as_they_were_right() -> None:
    draw = random.Random(1)
    good, bad = Guesses(), Guesses()
    for _ in range(200):
        length = math.exp(draw.gauss(8, 1))
        good.ended(1, length * math.exp(draw.gauss(0, 0.05)), length)
        bad.ended(1, length * math.exp(draw.gauss(0, 3)), length)
    assert good.estimate(1, 50_000.0).seconds == pytest.approx(50_000.0, rel=0.3)
    assert bad.estimate(1, 1e6).seconds < 50_000.0
    assert bad.estimate(1, 1e6, limit=60.0).seconds == 60.0
    assert unknown().remaining(7200.0) > given(7300.0).remaining(7200.0)


def test_a_forecast_of_a_line_whose_durations_are_known_is_what_happens() -> None:
    draw = random.Random(4)
    jobs = [
        Job(
            number=number,
            name=f"j{number}",
            submit_seconds=0.0,
            duration_seconds=draw.uniform(10, 1000),
            gpus=1,
        )
        for number in range(40)
    ]
    told: dict[int, Forecast] = {}

    def on_turn(line: Line, now: float) -> None:
        if not told:
            steps = forecasts(line, now, draws=2)
            while True:
                try:
                    next(steps)
                except StopIteration as done:
                    told.update({entry.payload.number: done.value[entry.number] for entry in line})
                    break
            assert told == {entry.payload.number: forecast(line, now)[entry.number] for entry in line}

    nodes = [Node(f"n{at}", 10**9, 10**9, 4, "A") for at in range(2)]
    found = replay(nodes, jobs, fifo, make("best-fit"), on_turn=on_turn)
    started = {run.job.number: run.started_at for run in found.runs}
    assert len(told) > 30
    assert {number: seen.expected for number, seen in told.items()} == pytest.approx({at: started[at] for at in told})


def test_past_forecasts_correct_the_next() -> None:
    draw = random.Random(5)
    learned = Calibration()
    inside = late = 0
    for number in range(400):
        told = Forecast(90.0, 100.0, 110.0)
        actual = 200.0 * math.exp(draw.gauss(0, 0.5))
        shown = learned.corrected(0.0, told)
        if number >= 100:
            inside += shown.low <= actual <= shown.high
            late += actual > shown.expected
        learned.started(0.0, told, actual)
    assert 0.75 <= inside / 300 <= 0.87
    assert 0.4 <= late / 300 <= 0.6


async def test_what_quotas_keep_waiting_has_no_forecast() -> None:
    queue = WaitingQueue(Line(Fleet(), Policies(), fifo))
    why = Rejection(code=RejectionCode.NO_CAPACITY, message="full")
    queued = queue.add(WorkRequest(owner="a", wait_seconds=100), 0.0, unknown(), why, None, steady=0.0)
    forecaster = Forecaster(queue, Estimator())
    found: list[bool] = []
    for refused in ("", "group lab uses all that it may", ""):
        queued.entry.group.refused = refused
        await forecaster.renew()
        found.append(queue.listing(1.0).entries[0].forecast is not None)
    assert found == [True, False, True]


async def test_nobody_knows_when_a_device_that_strangers_use_comes_free() -> None:
    fleet = fleet_of(inventory("h0", 2 * ["NVIDIA H100 80GB HBM3"]), live=True)
    queue = WaitingQueue(Line(fleet, Policies(), fifo))
    why = Rejection(code=RejectionCode.NO_CAPACITY, message="in use")
    for gpus in (1, 2):
        queue.add(WorkRequest(owner="a", gpus=gpus, wait_seconds=100), NOW, unknown(), why, None, steady=0.0)
    assert all(math.isfinite(one.expected) for one in forecast(queue.line, NOW).values())
    fold.apply(fleet, processes("h0", NOW + 1, [("GPU-h0-1", "", 300 * MIB)]), NOW + 1)
    one, both = (told.expected for _, told in sorted(forecast(queue.line, NOW + 1).items()))
    assert math.isfinite(one)
    assert both == math.inf


@settings(deadline=None, max_examples=100)
@cases(st.data(), st.lists(counts, min_size=1, max_size=8), st.sets(st.integers(0, 7)))
def test_hosts_with_room_are_those_of_a_look_at_all_of_them(
    data: st.DataObject, counts_at_first: list[float], allowed: set[int]
) -> None:
    room, free = FreeDevices({}), dict[int, float]()
    changes = [*enumerate(counts_at_first), *data.draw(st.lists(st.tuples(st.integers(0, 7), counts), max_size=12))]
    for host, count in changes:
        room.add(host, count - free.get(host, 0.0))
        free[host] = count
        if not count:
            del free[host]  # it is the last of its equals once it has some again
        most = data.draw(st.dictionaries(st.integers(0, 7), counts, max_size=3))
        devices, number = data.draw(st.sampled_from([0.5, 1.0, 2.0, 4.0, 7.0])), data.draw(st.integers(1, 3))
        usable = {host: min(count, most.get(host, count)) for host, count in free.items()}
        usable = {host: count for host, count in usable.items() if count and host in allowed}
        able = sorted((host for host in usable if usable[host] >= devices), key=lambda host: usable[host])
        assert room.tightest(devices, allowed, most) == (able[0] if able else None)
        assert room.tightest_hosts(number, devices, allowed, most) == (able[:number] if len(able) >= number else None)
        taken, left = dict[int, float](), devices
        for host in sorted(usable, key=lambda host: -usable[host]):
            if left:
                taken[host] = min(left, usable[host])
                left -= taken[host]
        assert room.fewest(devices, allowed, most) == (None if left else taken)


def test_a_forecast_of_many_on_a_free_fleet_pauses_often() -> None:
    fleet = fleet_of_nodes([Node(f"n{at}", 10**9, 10**9, 8, "H100") for at in range(200)])
    line = Line(fleet, Policies(DEFAULT))
    for number in range(1500):
        line.arrive(WorkRequest(owner=f"o{number % 7}", gpus=1 + number % 2), given(60.0), float(number))
    # Each start takes a search, which counts as 16 hosts: 4,096 hosts are looked at between two pauses.
    assert sum(1 for _ in forecasts(line, 2000.0, draws=2)) > 2 * 800 * 16 / 4096
