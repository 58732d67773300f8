"""Requests whose hosts must share the value of a label: which rack is taken, when one is free, and what is said."""

from __future__ import annotations

from typing import Any

import pytest
from corral.planner.fleet.fleet import Fleet, LeaseEnded, advance, apply, hold
from corral.planner.placement.decide import InvalidRequest, Placed, Policies, ask_of, decide, explain
from corral.planner.queue.backfill import NOW as FREE
from corral.planner.queue.backfill import Horizons
from corral.planner.queue.durations import given
from corral.planner.queue.forecast import forecast
from corral.planner.queue.line import Line
from corral.planner.queue.order import fifo
from corral.schemas.operations import Drains
from corral.schemas.requests import Grant, Placement, Rejection, RejectionCode, WorkRequest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st
from support.planner_world import NOW, ask, fleet_of, inventory, placed

T4 = "Tesla T4"
FEWEST = Placement.FEWEST_HOSTS


def racks(sizes: dict[str, list[int]], bare: int = 0) -> Fleet:
    """Hosts of so many devices by rack, `r1-0`, `r1-1`, …; and one of `bare` devices without a label."""
    found = [
        inventory(f"{rack}-{number}", [T4] * size, labels={"rack": rack})
        for rack, hosts in sizes.items()
        for number, size in enumerate(hosts)
    ]
    return fleet_of(*found, *([inventory("bare", [T4] * bare)] if bare else []))


def hosts_of(decision: object) -> list[str]:
    assert isinstance(decision, Placed), decision
    return sorted({grant.host for grant in decision.grants})


def take(fleet: Fleet, host: str, devices: int, lease: str = "") -> None:
    held = [Grant(host=host, device=f"GPU-{host}-{index}") for index in range(devices)]
    hold(fleet, lease or f"l-{host}", held)


def test_the_rack_that_needs_the_fewest_hosts_and_then_has_the_least_left_is_taken() -> None:
    fleet = racks({"r1": [4, 4, 4], "r2": [2, 2, 2, 2], "r3": [4, 4], "r4": [4, 4]}, bare=8)
    together = {"placement": FEWEST, "within": "rack"}
    assert hosts_of(ask(fleet, gpus=8, **together)) == ["r3-0", "r3-1"]
    take(fleet, "r3-0", 1)
    assert hosts_of(ask(fleet, gpus=8, **together)) == ["r4-0", "r4-1"]
    assert hosts_of(ask(fleet, gpus=5, **together)) == ["r3-0", "r3-1"]
    assert hosts_of(ask(fleet, gpus=12, **together)) == ["r1-0", "r1-1", "r1-2"]
    assert hosts_of(ask(fleet, gpus=4, within="rack", placement=Placement.SPREAD)) == [f"r2-{n}" for n in range(4)]
    assert hosts_of(ask(fleet, gpus=8, placement=FEWEST)) == ["bare"]


def test_a_preference_is_kept_where_it_can_be() -> None:
    fleet = racks({"r1": [4], "r2": [2, 2, 2]})
    wish = {"gpus": 5, "placement": FEWEST, "prefer_within": "rack"}
    assert hosts_of(ask(fleet, **wish)) == ["r2-0", "r2-1", "r2-2"]
    take(fleet, "r2-0", 2)
    assert hosts_of(ask(fleet, **wish)) == ["r1-0", "r2-1"]
    # Of the hosts within one must, those within the other would rather.
    zones = fleet_of(
        *(inventory(f"h{n}", [T4], labels={"zone": f"z{n // 4}", "rack": f"r{n // 2}"}) for n in range(1, 7)),
    )
    both = {"gpus": 2, "placement": FEWEST, "within": "zone", "prefer_within": "rack"}
    assert hosts_of(ask(zones, **both)) == ["h2", "h3"]
    take(zones, "h2", 1)
    assert hosts_of(ask(zones, **both)) == ["h4", "h5"]
    take(zones, "h4", 1)
    assert hosts_of(ask(zones, **both)) == ["h1", "h3"]


def test_a_rejection_names_the_rack_that_is_nearest() -> None:
    fleet = racks({"r1": [4, 4], "r2": [4, 2]}, bare=2)
    take(fleet, "r1-0", 3)
    wish = {"gpus": 8, "placement": FEWEST, "within": "rack"}
    answer = ask(fleet, **wish)
    assert isinstance(answer, Rejection)
    assert answer.code is RejectionCode.NO_CAPACITY
    assert answer.message == (
        "0/16 devices: 11 could be used, but the request needs 8 within one rack (nearest: rack r2 with 6), "
        "3 leased, 2 on hosts that the request does not allow, or without the label rack"
    )
    assert answer.nearest == "ask for 6 devices, or with prefer_within (--prefer-within), which would fit now"
    told = explain(fleet, WorkRequest(owner="me", **wish), NOW, Policies())
    assert told.rejection == answer
    assert told.hosts["r1-1"] == "rack r1 could hold 5 of 8 devices"
    assert told.hosts["bare"].startswith("on hosts that the request does not allow")
    apply(fleet, Drains(drains={"label:rack=r2": "x", "host:bare": "x"}))
    answer = ask(fleet, **wish)
    assert isinstance(answer, Rejection)
    assert answer.nearest == "ask for 5 devices, which rack r1 has free"
    # 16 devices are there, but never in one rack.
    answer = ask(fleet, **{**wish, "gpus": 9})
    assert isinstance(answer, Rejection)
    assert answer.code is RejectionCode.IMPOSSIBLE


def test_a_label_is_for_several_hosts() -> None:
    fleet = racks({"r1": [4]}, bare=1)
    for field in ("within", "prefer_within"):
        with pytest.raises(InvalidRequest, match="set it to fewest_hosts or spread") as caught:
            ask(fleet, gpus=2, **{field: "rack"})
        assert caught.value.field == f"$.{field}"
    assert hosts_of(ask(fleet, within="rack", policy="best-fit")) == ["bare"]  # one device is on one host anyway


@settings(deadline=None, max_examples=100)
@cases(
    st.dictionaries(st.sampled_from(["r1", "r2", "r3"]), st.lists(st.integers(1, 3), min_size=1, max_size=3)),
    st.lists(st.integers(1, 9), min_size=27, max_size=27),
    st.integers(2, 6),
    st.sampled_from([0, 1, 2]),
)
def test_the_reservation_is_in_the_rack_that_comes_free_first(
    sizes: dict[str, list[int]], ends: list[int], wanted: int, each: int
) -> None:
    """Each device has a lease that ends at a time; one that ends at 9 is not expected to end.

    `each` is the number of devices on each host; 0 for any, on as few hosts as can.
    """
    fleet = racks(sizes)
    line = Line(fleet, Policies(), fifo)
    left = iter(ends)
    times: dict[str, list[list[int]]] = {}
    for name, host in fleet.hosts.items():
        of_host = times.setdefault(host.labels["rack"], [])
        of_host.append(sorted(next(left) for _ in host.devices))
        for device, at in zip(host.devices, of_host[-1], strict=True):
            hold(fleet, device.uuid, [Grant(host=name, device=device.uuid)])
            if at < 9:
                line.adopt(device.uuid, "o", 1.0, given(float(at)), 0.0)
    wish = {"placement": Placement.SPREAD, "gpus_per_host": each, "gpus": wanted * each}
    request = WorkRequest(owner="me", within="rack", **(wish if each else {"placement": FEWEST, "gpus": wanted}))
    plan = Horizons(fleet, line.ends).plan(ask_of(fleet, request), "me")
    best = 10
    for rack in times.values():
        taken = sorted(at for host in rack for at in (host[each - 1 : each] if each else host))
        if len(taken) >= wanted:
            best = min(best, taken[wanted - 1])
    assert (plan is None) == (best == 10)
    if plan is not None:
        assert plan.starts_at == (float("inf") if best == 9 else best)
        hosts = [name for name, _, _ in plan.reservation.hosts]
        assert len({fleet.hosts[name].labels["rack"] for name in hosts}) == 1
        assert len(plan.reservation.devices) == request.gpus


def test_a_request_waits_for_one_rack_and_others_pass_in_the_rest() -> None:
    fleet = racks({"r1": [1, 1], "r2": [1, 1], "r3": [1]})
    advance(fleet, NOW)
    line = Line(fleet, Policies(), fifo)
    for host, seconds in (("r1-0", 10.0), ("r1-1", 100.0), ("r2-0", 20.0), ("r2-1", 30.0)):
        take(fleet, host, 1, host)
        line.adopt(host, "o", 1.0, given(seconds), NOW)
    together = line.arrive(
        WorkRequest(owner="me", gpus=2, placement=FEWEST, within="rack"), given(50.0), NOW, payload="together"
    )
    assert list(line.serve(NOW)) == []
    (held,) = line.held
    assert (held.entry, held.starts_at, held.hosts) == (together, NOW + 30.0, {"r2-0", "r2-1"})
    assert forecast(line, NOW)[together.number].expected == NOW + 30.0
    # r3-0 is nothing that it could take together with another host.
    other = line.arrive(WorkRequest(owner="you"), given(1e6), NOW)
    (start,) = line.serve(NOW)
    assert (start.entry, start.picks[0].host.name) == (other, "r3-0")
    hold(fleet, "other", [Grant(host="r3-0", device="GPU-r3-0-0")])
    line.started("other", other, NOW)
    for host in ("r2-0", "r1-0"):
        line.ended(host, NOW + 21.0)
        apply(fleet, LeaseEnded(host))
    # One device in each of two racks: neither holds both, and another request may have that in r1.
    late = line.arrive(WorkRequest(owner="you", hosts=["r*"]), given(1e6), NOW + 21.0)
    (start,) = line.serve(NOW + 21.0)
    assert (start.entry, start.picks[0].host.name) == (late, "r1-0")
    hold(fleet, "late", [Grant(host="r1-0", device="GPU-r1-0-0")])
    line.started("late", late, NOW + 21.0)
    line.ended("r2-1", NOW + 30.0)
    apply(fleet, LeaseEnded("r2-1"))
    (start,) = line.serve(NOW + 30.0)
    assert start.entry is together
    assert sorted(pick.host.name for pick in start.picks) == ["r2-0", "r2-1"]


def test_what_is_reserved_moves_on_when_a_host_moves_to_another_rack() -> None:
    fleet = racks({"r1": [1, 1], "r2": [1]})
    horizons = Horizons(fleet, Line(fleet, Policies()).ends)
    request = WorkRequest(owner="me", gpus=2, placement=FEWEST, within="rack")
    before = horizons.plan(ask_of(fleet, request), "me")
    assert before is not None
    assert (before.starts_at, {name for name, _, _ in before.reservation.hosts}) == (FREE, {"r1-0", "r1-1"})
    apply(fleet, inventory("r1-1", [T4], labels={"rack": "r2"}, time_ns=2), NOW)
    after = horizons.plan(ask_of(fleet, request), "me", before=before.reservation)
    assert after is not None
    assert {name for name, _, _ in after.reservation.hosts} == {"r1-1", "r2-0"}
    assert hosts_of(decide(fleet, request, NOW, Policies())) == ["r1-1", "r2-0"]
    assert placed(decide(fleet, request, NOW, Policies())).grants


@pytest.mark.parametrize("wish", [{"gpus": 2, "placement": FEWEST, "within": "rack"}, {"host_labels": {"rack": "r1"}}])
def test_who_waits_starts_once_a_host_that_is_free_has_got_the_label(wish: dict[str, Any]) -> None:
    fleet = racks({"r1": [1], "r2": [1]}, bare=1)
    take(fleet, "r1-0", 1, "other")
    line = Line(fleet, Policies(), fifo)
    entry = line.arrive(WorkRequest(owner="me", **wish), given(50.0), NOW)
    assert list(line.serve(NOW)) == []
    apply(fleet, inventory("bare", [T4], labels={"rack": "r1" if "host_labels" in wish else "r2"}, time_ns=2), NOW)
    (start,) = line.serve(NOW + 1.0)
    assert start.entry is entry
