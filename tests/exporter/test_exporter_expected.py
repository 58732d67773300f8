"""Expected hosts and devices that are missing: silent hosts, removed boards, and no false alarms."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from corral.exporter.expected import EXPECTED_SECONDS
from corral.schemas import codec, subjects
from corral.schemas.telemetry import DeviceEvent, HostInfo, Inventory, Severity
from support.exporter_bus import Bus, device
from support.exporter_process import exporting, get, parse, running
from support.local_cluster import CORRAL, wait_for


def silent(fleet: Bus) -> dict[str, float]:
    return {host.name: fleet.live.age_seconds(host) for host in fleet.live.known() if host.expected}


def missing(fleet: Bus) -> list[str]:
    return [found.uuid for found in fleet.live.missing()]


def listed(host: str, *devices: Any, **more: Any) -> bytes:
    return codec.encode(Inventory(host=HostInfo(name=host), agent="a", time_ns=1, devices=list(devices), **more))


def test_a_dead_host_is_told_of_until_it_returns_or_has_left() -> None:
    fleet = Bus()
    fleet.inventory(device(0))
    fleet.inventory(device(1, host="h2"), host="h2")
    fleet.samples(["GPU-0"], temperature_celsius=[40.0])
    fleet.samples(["GPU-1"], host="h2", temperature_celsius=[40.0])
    fleet.clock.now += 7200
    fleet.samples(["GPU-1"], host="h2", temperature_celsius=[40.0])
    assert silent(fleet) == {"h1": 7200, "h2": 0}
    assert [host.name for host in fleet.live.hosts() if host.batch is not None] == ["h2"]
    fleet.samples([])
    assert silent(fleet) == {"h1": 0, "h2": 0}
    fleet.live.take_inventory(subjects.inventory_subject("h1"), listed("h1", device(0), leaving=True))
    assert silent(fleet) == {"h2": 0}
    fleet.inventory(device(0))
    assert set(silent(fleet)) == {"h1", "h2"}
    fleet.clock.now += EXPECTED_SECONDS
    assert silent(fleet) == {}, "for a week, and no longer"


def test_a_machine_with_another_name_is_not_missed_under_the_old() -> None:
    fleet = Bus()
    fleet.inventory(device(0))
    fleet.samples(["GPU-0"])
    fleet.clock.now += 300
    fleet.live._owners.leave("h1")  # it has been silent for long
    fleet.live.take_inventory("i.new", listed("new", device(0, host="new")))
    fleet.samples(["GPU-0"], host="new")
    assert set(silent(fleet)) == {"new"}


def test_nobody_is_silent_for_the_bus_being_away() -> None:
    fleet = Bus()
    fleet.inventory(device(0))
    fleet.samples([])
    fleet.clock.now += 10
    fleet.live.away()
    fleet.clock.now += 3600
    assert silent(fleet) == {"h1": 10}


def test_what_streams_have_of_a_host_that_died_before_the_exporter_started() -> None:
    fleet = Bus()
    fleet.live._readings += 1  # as `start` does
    fleet.live._take_stored_inventory("i.h1", listed("h1", device(0)), time.time() - 500)
    assert 499 < silent(fleet)["h1"] < 510
    fleet.samples([])
    assert silent(fleet)["h1"] == 0


def test_a_board_is_missing_until_its_slot_is_filled_or_it_turns_up() -> None:
    fleet = Bus()
    mig = device(1, uuid="MIG-1", mig_parent="GPU-1", mig_profile="1g.10gb")
    fleet.inventory(device(0), device(1), mig, device(2))
    fleet.inventory(device(0), device(1))
    assert missing(fleet) == ["GPU-2"], "neither the others nor an instance"
    fleet.inventory(device(0), device(1), device(2, uuid="GPU-new"))
    assert missing(fleet) == []
    fleet.inventory(device(0), device(1))
    assert missing(fleet) == ["GPU-new"]
    fleet.live.take_inventory("i.h2", listed("h2", device(5, uuid="GPU-new", host="h2")))
    assert missing(fleet) == []
    fleet.inventory(device(0))
    assert missing(fleet) == ["GPU-1"]
    fleet.live.take_inventory(subjects.inventory_subject("h1"), listed("h1", leaving=True))
    assert missing(fleet) == [], "a host that has left in order misses nothing"


def test_an_event_tells_of_a_board_that_no_inventory_lists_any_more() -> None:
    def started(uuid: str, address: str, days_ago: float) -> None:
        event = DeviceEvent(
            host="h1", agent="old", sequence=1, time_ns=1, kind="device_started", severity=Severity.CLEARED,
            device=uuid, data={"pcie_address": address, "index": 7, "name": "NVIDIA H100"},
        )  # fmt: skip
        fleet.live._take_stored_event("e.h1", codec.encode(event), time.time() - days_ago * 86_400)

    fleet = Bus()
    fleet.inventory(device(0))
    started("GPU-0", "00000000:00:00.0", 2)
    started("GPU-7", "00000000:07:00.0", 2)
    started("GPU-8", "00000000:08:00.0", 8)
    (found,) = fleet.live.missing()
    assert (found.uuid, found.index, found.name, found.host) == ("GPU-7", 7, "NVIDIA H100", "h1")


def test_a_killed_collector_is_told_of_by_an_exporter_that_starts_later(server: Any, tmp_path: Path) -> None:
    collect = (
        *CORRAL, "collect", "--nats", server.url, "--source", "simulated", "--hosts", "1", "--devices", "2",
        "--interval", "200ms", "--no-spill", "--state", str(tmp_path / "state"),
    )  # fmt: skip

    def told(address: str, name: str) -> list[float]:
        return list(parse(get(f"{address}?name[]=corral_host_*")).get(name, {}).values())

    with exporting(server.url, tmp_path / "export.log", "--forget", "1s") as address:
        with running(tmp_path / "collect-1.log", *collect) as collector:
            wait_for(lambda: len(parse(get(f"{address}?name[]=DCGM_*")).get("DCGM_FI_DEV_GPU_TEMP", ())) == 2, 30)
            collector.kill()
        wait_for(lambda: told(address, "corral_host_silent_seconds")[0] > 1)
        assert told(address, "corral_host_expected") == [1]
    with exporting(server.url, tmp_path / "export-2.log", "--forget", "1s") as address:
        wait_for(lambda: told(address, "corral_host_silent_seconds")[0] > 1)
        with running(tmp_path / "collect-2.log", *collect):
            wait_for(lambda: told(address, "corral_host_silent_seconds")[0] < 1, 30)
