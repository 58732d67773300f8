"""Use of shared devices by lease and process, as a real scrape has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corral.exporter.live import LiveFleet
from corral.exporter.processes import MOST_PROCESSES, Shown, by_lease, families
from corral.schemas import codec, subjects
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory, ProcessBatch, ProcessSample
from msgspec.structs import replace
from support.exporter_process import Series, exporting, get, parse
from support.lease_examples import granted
from support.local_cluster import LocalCluster, wait_for


def test_two_leases_on_one_device_have_their_own_use(cluster: LocalCluster, tmp_path: Path) -> None:
    first = cluster.json("request", "--share", "0.5", "--memory", "4GiB", "--name", "left", "--owner", "p1")["lease"]
    device = first["grants"][0]["device"]
    packed = (
        "request",
        "--share",
        "0.25",
        "--memory",
        "2GiB",
        "--host",
        first["grants"][0]["host"],
        "--policy",
        "pack",
    )
    second = cluster.json(*packed, "--name", "right", "--owner", "p2")["lease"]
    assert second["grants"][0]["device"] == device
    try:
        with exporting(cluster.url, tmp_path / "export.log", "--processes", "all") as address:

            def held(series: Series, name: str) -> dict[str, float]:
                found = {dict(k)["owner"]: v for k, v in series.get(name, {}).items() if ("UUID", device) in k}
                return {owner: value for owner, value in found.items() if owner in ("p1", "p2")}

            def both() -> Any:
                page = parse(get(address))
                return len(held(page, "corral_process_memory_used_bytes")) == 2 and page

            page = wait_for(both)
            used = held(page, "corral_device_lease_memory_used_bytes")
            assert used == held(page, "corral_process_memory_used_bytes")
            assert 0 < used["p1"] <= 4 << 30
            assert 0 < used["p2"] <= 2 << 30
            assert held(page, "corral_device_lease_processes") == {"p1": 1, "p2": 1}
            assert all(0 <= value <= 1 for value in held(page, "corral_device_lease_sm_utilization_ratio").values())
            (labels,) = (dict(k) for k in page["corral_process_memory_used_bytes"] if ("owner", "p2") in k)
            assert (labels["lease"], labels["name"], labels["UUID"]) == (second["lease_id"], "right", device)
            assert labels["pid"].isdigit()
        with exporting(cluster.url, tmp_path / "without.log", "--processes", "none") as address:
            page = wait_for(lambda: "corral_device_lease_share" in (s := parse(get(address))) and s)
            assert not [name for name in page if name.startswith(("corral_process_", "corral_device_unleased"))]
            assert "corral_device_lease_processes" not in page
    finally:
        cluster.json("release", first["lease_id"], "--owner", "p1")
        cluster.json("release", second["lease_id"], "--owner", "p2")


def fleet(*processes: ProcessSample, identified: bool = True) -> LiveFleet:
    live = LiveFleet(None, processes=True)  # type: ignore[arg-type]
    device = DeviceInfo(uuid="GPU-a", host="h", index=0)
    inventory = Inventory(host=HostInfo(name="h"), agent="a", time_ns=1, devices=[device])
    live.take_inventory(subjects.inventory_subject("h"), codec.encode(inventory))
    batch = ProcessBatch(host="h", agent="a", sequence=1, time_ns=1, processes=list(processes), identified=identified)
    live.take_processes(subjects.processes_subject("h"), codec.encode(batch))
    live.take_samples(subjects.samples_subject("h"), b"")
    return live


def values(live: LiveFleet, shown: Shown) -> dict[str, list[float]]:
    found = families(live.hosts(), [], shown)
    return {family.name: [sample.value for sample in family.samples] for family in found if family.samples}


def test_processes_are_bounded_and_those_without_a_lease_are_summed_up() -> None:
    many = [ProcessSample(device="GPU-a", pid=n, memory_used_bytes=n << 20) for n in range(1, 101)]
    found = values(fleet(*many), Shown.ALL)
    assert found["corral_process_memory_used_bytes"] == [n << 20 for n in range(100, 100 - MOST_PROCESSES, -1)]
    assert found["corral_device_processes_left_out"] == [100 - MOST_PROCESSES]
    assert found["corral_device_unleased_memory_used_bytes"] == [sum(range(1, 101)) << 20]
    assert set(values(fleet(*many), Shown.LEASES)) == {
        "corral_device_unleased_processes",
        "corral_device_unleased_memory_used_bytes",
    }


def test_a_process_that_names_a_lease_of_another_device_is_without_one() -> None:
    lease = granted().lease
    (grant,) = lease.grants
    own = replace(lease, grants=[replace(grant, host="h", device="GPU-a")])
    other = replace(lease, lease_id="other", owner="eve", grants=[replace(grant, host="h", device="GPU-b")])
    live = fleet(
        ProcessSample(device="GPU-a", pid=1, lease=own.lease_id, memory_used_bytes=1),
        ProcessSample(device="GPU-a", pid=2, lease="other", memory_used_bytes=2),
    )
    found = {
        (each.device, "" if each.lease is None else each.lease.owner): each.use.memory_used_bytes
        for each in by_lease(live.hosts(), [own, other])
    }
    assert found == {("GPU-a", own.owner): 1, ("GPU-a", ""): 2, ("GPU-b", "eve"): None}
    series = {family.name: family for family in families(live.hosts(), [own, other], Shown.ALL)}
    memory = series["corral_process_memory_used_bytes"].samples
    assert {sample.labels["pid"]: sample.labels["owner"] for sample in memory} == {"1": own.owner, "2": ""}


def test_what_nobody_leases_and_what_cannot_be_attributed() -> None:
    desktop = ProcessSample(device="GPU-a", pid=1, kind="graphics", name="Xorg", memory_used_bytes=1)
    hidden = ProcessSample(device="GPU-a", pid=2, lease="long-gone")
    (one,) = by_lease(fleet(desktop, hidden).hosts(), [])
    assert (one.lease, one.use.processes, one.use.memory_used_bytes) == (None, 1, None)
    assert by_lease(fleet(hidden, identified=False).hosts(), []) == []
