"""Estimates of requests that come in bursts: their siblings say how long they take."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.queue.bursts import GAP_SECONDS, Bursts
from corral.planner.queue.durations import KNOTS, Durations, Kind, given
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st
from nats.aio.client import Client as Bus
from support.planner_rig import FakeHosts, ask, running, until_ready

SWEEP = Kind("ann", "", 1)


def durations() -> tuple[Bursts[object], Durations]:
    bursts: Bursts[object] = Bursts(KNOTS)
    known = Durations(bursts)
    draw = random.Random(1)
    for number in range(60):  # most work takes ten minutes
        known.learn(Kind("bob", "", 1), float(number), 600.0 * draw.lognormvariate(0, 0.5), True)
    return bursts, known


def test_siblings_that_ended_or_grow_old_say_how_long_the_others_take() -> None:
    bursts, known = durations()
    for number in range(6):
        bursts.submitted(number, SWEEP.burst, 1000.0 + 60 * number)
    first = known.estimate(SWEEP, 1500.0, lease=5)
    assert (first.basis, first.known) == ("shape", False)
    for number in range(3):
        known.started(number, SWEEP, 1400.0)
    assert bursts.changed(1400.0 + 7 * 3600)
    old = known.estimate(SWEEP, 1400.0 + 7 * 3600, lease=5)
    assert old.basis == "burst"
    assert old.seconds > 5 * 3600 > first.quantile(0.9)
    end = 1400.0 + 10 * 3600
    for number in range(3):
        known.ended(number, SWEEP, end)
    assert set(bursts.changed(end)) == {3, 4, 5}
    after = known.estimate(SWEEP, end, lease=5)
    assert after.quantile(0.1) < 10 * 3600 < after.quantile(0.9)
    assert after.quantile(0.9) / after.quantile(0.1) < old.quantile(0.9) / old.quantile(0.1)
    # Who comes later is no sibling, nor is another owner's request, nor one whose name is known.
    bursts.submitted("late", SWEEP.burst, 1300.0 + GAP_SECONDS + 1)
    bursts.submitted("other", ("bob", 1), 1301.0)
    assert known.estimate(SWEEP, end, lease="late").basis != "burst"
    assert known.estimate(Kind("bob", "", 1), end, lease="other").basis == "owner_shape"
    for number in range(3):
        known.learn(Kind("ann", "eval", 1), end + number, 5.0, True)
    assert known.estimate(Kind("ann", "eval", 1), end, lease=4).basis == "owner_name"
    assert known.estimate(SWEEP, end, 60.0, lease=4).quantile(0.99) == 60.0


@settings(deadline=None, max_examples=40)
@cases(
    st.lists(
        st.tuples(st.sampled_from(["submit", "start", "end", "cut", "withdraw", "pass"]), st.integers(0, 9)),
        max_size=60,
    )
)
def test_siblings_have_one_estimate_and_nothing_is_kept_of_what_is_over(steps: list[tuple[str, int]]) -> None:
    bursts, known = durations()
    now = 1000.0
    state: dict[int, str] = {}
    for step, number in steps:
        if step == "submit" and number not in state:
            bursts.submitted(number, SWEEP.burst, now)
            state[number] = "waits"
        elif step == "start" and state.get(number) == "waits":
            known.started(number, SWEEP, now)
            state[number] = "runs"
        elif step in ("end", "cut") and state.get(number) == "runs":
            known.ended(number, SWEEP, now, step == "end")
            del state[number]
        elif step == "withdraw" and state.get(number) == "waits":
            bursts.withdrawn(number)
            del state[number]
        elif step == "pass":
            now += 10.0 ** (number / 2)
        for changed in bursts.changed(now):
            assert changed in state
        for waits in state:
            found = known.estimate(SWEEP, now, lease=waits)
            assert list(found.quantiles) == sorted(found.quantiles)
            assert {known.estimate(SWEEP, now, lease=other) for other in state if shared(bursts, other, waits)} <= {
                found
            }
    for number in list(state):
        bursts.withdrawn(number)
        bursts.ended(number, now)
    assert not bursts._of
    assert bursts.changed(now) == []


def shared(bursts: Bursts[object], one: int, other: int) -> bool:
    return bursts._of[one] is bursts._of[other]


def test_a_given_duration_is_known_and_a_learned_median_is_what_half_exceed() -> None:
    assert given(100.0).known
    _, known = durations()
    found = known.estimate(Kind("bob", "", 1), 100.0)
    assert found.seconds == pytest.approx(600.0, rel=0.3)


async def test_a_real_planner_estimates_who_waits_with_its_siblings(server: EmbeddedServer, nc: Bus) -> None:
    hosts = FakeHosts(nc, hosts=1, devices=2)
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 2)
        leases = [(await ask(nc, "request", {"owner": "ann", "gpus": 1}))["lease"]["lease_id"] for _ in range(2)]
        waits = [
            asyncio.create_task(ask(nc, "request", {"owner": owner, "gpus": 1, "wait_seconds": 60}, timeout=60))
            for owner in ("ann", "ann", "bob")
        ]

        async def estimates(count: int) -> list[tuple[str, dict[str, Any]]]:
            for _ in range(300):
                entries = (await ask(nc, "queue"))["entries"]
                if len(entries) == count:
                    return [(entry["owner"], entry["estimate"]) for entry in entries]
                await asyncio.sleep(0.05)
            raise TimeoutError(f"{count} do not wait")

        before = await estimates(3)
        assert sorted((owner, found["basis"]) for owner, found in before) == [
            ("ann", "burst"),
            ("ann", "burst"),
            ("bob", "none"),
        ]
        await ask(nc, "release", {"owner": "ann", "lease_id": leases[0]})
        least = min(found["seconds"] for owner, found in before if owner == "ann")
        # The one that ended took seconds: so will the others.
        while True:
            after = [found for owner, found in await estimates(2) if owner == "ann"]
            assert {found["basis"] for found in after} == {"burst"}
            if max(found["seconds"] for found in after) < least:
                break
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
