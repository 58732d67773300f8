"""A machine that goes on under another name: its devices go with it, once, and a name that is alive keeps its own."""

from __future__ import annotations

import pytest
from corral.planner.fleet import fleet as fold
from corral.schemas.telemetry import Inventory
from msgspec.structs import replace
from support.planner_world import NOW, ask, fleet_of, inventory, placed, samples

H100 = "NVIDIA H100 80GB HBM3"
MACHINE = ["installation", "boot"]


def under(name: str, source: Inventory, *, machine: list[str], time_ns: int, leaving: bool = False) -> Inventory:
    """The devices of an inventory as another name lists them."""
    devices = [replace(device, host=name) for device in source.devices]
    host = replace(source.host, name=name, machine_ids=machine)
    return replace(source, host=host, devices=devices, agent=f"agent-{name}", time_ns=time_ns, leaving=leaving)


@pytest.fixture
def pod() -> Inventory:
    return under("pod", inventory("pod", [H100, H100]), machine=MACHINE, time_ns=1)


def names(fleet: fold.Fleet) -> dict[str, list[str]]:
    return {name: [device.uuid for device in host.devices] for name, host in fleet.hosts.items()}


UUIDS = ["GPU-pod-0", "GPU-pod-1"]


@pytest.mark.parametrize("machine", [MACHINE, []], ids=["known machine", "unknown machine"])
def test_who_leaves_gives_its_devices_to_the_next_name_at_once(pod: Inventory, machine: list[str]) -> None:
    fleet = fleet_of(pod, live=True)
    fold.apply(fleet, replace(pod, leaving=True, time_ns=2), NOW + 1)
    assert names(fleet) == {"pod": UUIDS}, "nobody else has listed them: it may be an upgrade"
    fold.apply(fleet, under("node", pod, machine=machine, time_ns=3), NOW + 2)
    assert names(fleet) == {"node": UUIDS}
    assert {device.host for device in fleet.devices.values()} == {"node"}
    # What was on its way from the old name changes nothing.
    fold.apply(fleet, replace(pod, leaving=True, time_ns=2), NOW + 2)
    assert fleet.devices["GPU-pod-0"].host == "node"


def test_the_new_name_may_come_before_the_old_one_has_left(pod: Inventory) -> None:
    fleet = fleet_of(pod, live=True)
    fold.apply(fleet, under("node", pod, machine=[], time_ns=2), NOW + 1)
    assert names(fleet) == {"pod": UUIDS, "node": []}
    assert fleet.claims["node"].owners == dict.fromkeys(UUIDS, "pod")
    fold.apply(fleet, replace(pod, leaving=True, time_ns=3), NOW + 2)
    assert names(fleet) == {"node": UUIDS}
    assert not fleet.claims


@pytest.mark.parametrize(
    ("machine", "seconds"), [(MACHINE, 10.0), (["other", "boot"], 10.0), (["other"], 90.0), ([], 90.0)]
)
def test_a_killed_collector_s_machine_goes_on_once_its_samples_are_stale(
    pod: Inventory, machine: list[str], seconds: float
) -> None:
    fleet = fleet_of(pod, live=True)
    heard = fleet.hosts["pod"].heard_at
    fold.apply(fleet, under("node", pod, machine=machine, time_ns=2), heard + 3)
    fold.advance(fleet, heard + seconds)
    assert names(fleet)["pod"] == UUIDS
    # No message is needed: time alone tells.
    if seconds > 60:  # as each minute
        fold.apply(fleet, under("node", pod, machine=machine, time_ns=3), heard + 63)
    fold.advance(fleet, heard + seconds + 1)
    assert names(fleet)["node"] == UUIDS


def test_two_names_that_both_report_stay_a_conflict(pod: Inventory) -> None:
    fleet = fleet_of(pod, live=True)
    clone = under("clone", pod, machine=MACHINE, time_ns=2)
    for minute in range(5):
        at = NOW + 1 + minute * 60
        fold.apply(fleet, clone if minute == 0 else replace(clone, time_ns=2 + minute), at)
        for second in range(0, 60, 5):
            fleet.hosts["pod"].heard_at = fleet.hosts["clone"].heard_at = at + second
            fold.advance(fleet, at + second + 4)
    assert names(fleet) == {"pod": UUIDS, "clone": []}
    assert fleet.claims["clone"].owners == dict.fromkeys(UUIDS, "pod")
    # It lists them no more.
    fold.apply(fleet, replace(clone, devices=[], time_ns=99), NOW + 400)
    assert not fleet.claims


def test_leases_go_on_with_the_devices_and_keep_the_old_name_while_they_last(pod: Inventory) -> None:
    fleet = fleet_of(pod, live=True)
    fold.hold(fleet, "l1", placed(ask(fleet, gpus=1, cpus=2)).grants)
    held = next(uuid for uuid, device in fleet.devices.items() if device.holders)
    fold.apply(fleet, replace(pod, leaving=True, time_ns=2), NOW + 1)
    fold.apply(fleet, under("node", pod, machine=MACHINE, time_ns=3), NOW + 1)
    assert fleet.devices[held].host == "node"
    assert fleet.devices[held].holders.keys() == {"l1"}
    assert names(fleet) == {"pod": [], "node": UUIDS}
    fold.free(fleet, "l1")
    fold.apply(fleet, samples("node", UUIDS, NOW + 2, agent="agent-node"), NOW + 2)
    assert {grant.host for grant in placed(ask(fleet, now=NOW + 2, gpus=2)).grants} == {"node"}
