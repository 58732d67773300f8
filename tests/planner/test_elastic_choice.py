"""Choice of the devices that elastic leases are asked for: as few as let a request start, wherever any choice does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from corral.planner.fleet.fleet import Fleet, free, hold
from corral.planner.fleet.holdings import extend, give_back
from corral.planner.placement.decide import Policies, ask_of
from corral.planner.placement.select import select
from corral.planner.queue.durations import given as given_estimate
from corral.planner.queue.elastic import Surplus, growth_ask, largest, returns, wanted
from corral.planner.queue.line import Line
from corral.planner.simulation.simulate import fleet_of
from corral.planner.simulation.trace import Node
from corral.schemas.requests import Grant, Placement, WorkRequest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

NODES = [Node("a", 16_000, 1000, 4, "H100"), Node("b", 8_000, 1000, 4, "H100"), Node("c", 16_000, 1000, 3, "T4")]
POLICY = Policies("best-fit").get(None)
leases = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(0, 2), st.sampled_from([0.0, 1.0, 3.0])),
    max_size=7,
)


def each_of_a_host(fields: dict[str, Any]) -> dict[str, Any]:
    """A request for several devices on each of several hosts, where they are spread."""
    each = fields.pop("each", 1)
    if fields.get("placement") is not Placement.SPREAD or each == 1:
        return fields
    return {**fields, "gpus": fields["gpus"] * each, "gpus_per_host": each}


requests = st.fixed_dictionaries(
    {"gpus": st.integers(1, 6)},
    optional={
        "cpus": st.sampled_from([1.0, 6.0, 12.0]),
        "models": st.sampled_from([["H100"], ["T4"]]),
        "hosts": st.sampled_from([["a"], ["a", "c"]]),
        "placement": st.sampled_from([Placement.FEWEST_HOSTS, Placement.SPREAD]),
        "each": st.sampled_from([2, 3]),
    },
).map(each_of_a_host)


def filled(asked: list[tuple[str, int, int, float]]) -> tuple[Fleet, list[Surplus], dict[str, list[Grant]]]:
    """A fleet with leases on one host each, where there is room; and what they could give back."""
    fleet, surpluses, held = fleet_of(NODES), list[Surplus](), dict[str, list[Grant]]()
    for number, (name, count, spare, cpus) in enumerate(asked):
        host, lease_id = fleet.hosts[name], f"l{number}"
        idle = [device.uuid for device in host.devices if not device.holders][:count]
        if len(idle) < count or host.cpus_total - host.cpus_held < 1000 * cpus * count:
            continue
        held[lease_id] = [Grant(host=name, device=uuid, cpus=cpus) for uuid in idle]
        hold(fleet, lease_id, held[lease_id])
        if spare:
            surpluses.append(Surplus(lease_id, idle[::-1], min(spare, count)))
    return fleet, surpluses, held


def fits_without(fleet: Fleet, request: WorkRequest, held: dict[str, list[Grant]], back: dict[str, list[str]]) -> bool:
    """True if a request fits once these devices are back; they are taken again afterwards."""
    for lease_id, uuids in back.items():
        give_back(fleet, lease_id, [grant for grant in held[lease_id] if grant.device in uuids], 0.0)
    found = select(fleet, POLICY, ask_of(fleet, request)) is not None
    for lease_id in back:
        extend(fleet, lease_id, held[lease_id])
    return found


@settings(max_examples=60, deadline=None)
@given(leases, requests)
def test_devices_are_asked_for_where_they_help_and_no_more(
    asked: list[tuple[str, int, int, float]], fields: dict[str, object]
) -> None:
    fleet, surpluses, held = filled(asked)
    request = WorkRequest(owner="me", **fields)  # type: ignore[arg-type]
    most = {each.lease_id: list(each.devices[: each.spare]) for each in surpluses}
    assume(not fits_without(fleet, request, held, {}))
    helped = fits_without(fleet, request, held, most)
    back = returns(fleet, ask_of(fleet, request), surpluses)
    assert (back is not None) == helped
    for lease_id, uuids in (back or {}).items():
        assert 0 < len(set(uuids)) == len(uuids) <= len(most[lease_id])
        assert set(uuids) <= {grant.device for grant in held[lease_id]}
    if back is not None:
        assert fits_without(fleet, request, held, back)
        if request.placement is Placement.SAME_HOST:
            for lease_id, uuids in back.items():
                for uuid in uuids:
                    assert not fits_without(fleet, request, held, {**back, lease_id: [u for u in uuids if u != uuid]})


@settings(max_examples=60, deadline=None)
@given(leases, st.integers(1, 4), st.sampled_from([0.0, 2.0, 5.0]), st.sets(st.sampled_from(["H100", "T4"])))
def test_a_lease_starts_with_as_many_as_fit(
    asked: list[tuple[str, int, int, float]], least: int, cpus: float, barred: set[str]
) -> None:
    fleet, _, _ = filled(asked)
    request = WorkRequest(owner="me", gpus=least, gpus_max=9, cpus=cpus)
    fitting = [
        count for count in range(1, 10) if select(fleet, POLICY, growth_ask(fleet, request, count, barred)) is not None
    ]
    found = largest(fleet, POLICY, lambda count: growth_ask(fleet, request, count, barred), 1, 9)
    assert (found[0] if found else 0) == max(fitting, default=0)
    if found is not None:
        assert sum(len(pick.devices) for pick in found[1]) == found[0]
        assert not barred & {device.model.name for pick in found[1] for device in pick.devices}


def test_a_request_that_waits_for_some_hosts_keeps_leases_from_the_models_of_these_alone() -> None:
    fleet = fleet_of(NODES)
    line = Line(fleet, Policies("best-fit"))
    for host, models in (("b", {"H100"}), ("c", {"H100", "T4"})):
        line.arrive(WorkRequest(owner="me", gpus=5, hosts=[host]), given_estimate(60.0), 0.0)
        assert wanted(fleet, line.groups) == models


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sets(st.sampled_from([f"{host}{index}" for host in "ab" for index in range(4)])), min_size=1, max_size=6
    )
)
def test_the_fleet_is_the_same_as_if_each_lease_had_always_had_its_devices(shapes: Sequence[set[str]]) -> None:
    fleet, fresh = fleet_of(NODES), fleet_of(NODES)

    def grants(shape: set[str]) -> list[Grant]:
        return [
            Grant(host=name[0], device=fleet.hosts[name[0]].devices[int(name[1])].uuid, cpus=1.0, memory_bytes=9)
            for name in sorted(shape)
        ]

    hold(fleet, "l", grants(shapes[0]))
    hold(fleet, "other", [Grant(host="a", cpus=1.0)])
    for before, after in pairwise(shapes):
        give_back(fleet, "l", grants(before - after), 0.0)
        extend(fleet, "l", grants(after))
    hold(fresh, "l", grants(shapes[-1]))
    hold(fresh, "other", [Grant(host="a", cpus=1.0)])
    for name in ("on_device", "leases"):
        assert getattr(fleet, name) == getattr(fresh, name)
    for one, other in zip(fleet.hosts.values(), fresh.hosts.values(), strict=True):
        assert (one.cpus_held, one.memory_held) == (other.cpus_held, other.memory_held)
        for device, same in zip(one.devices, other.devices, strict=True):
            assert (device.holders, device.share_left) == (same.holders, same.share_left)
            assert device.state.leased == same.state.leased
    for lease_id in ("l", "other"):
        free(fleet, lease_id)
    for left in (fleet.on_device, fleet.on_host, fleet.at_host, fleet.leases):
        assert not left
