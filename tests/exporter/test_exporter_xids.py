"""Xids of devices: a fatal one stays until the device is reset, across restarts, and each is counted once."""

from __future__ import annotations

import asyncio
import time
from itertools import count
from pathlib import Path
from typing import Any

from corral.bus.layout import ensure_layout
from corral.exporter.xids import WINDOW_SECONDS, History, Xids
from corral.schemas import codec, columns, subjects, xids
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import DeviceEvent, DeviceInfo, HostInfo, Inventory, SampleBatch, Severity
from hypothesis import given, settings
from hypothesis import strategies as st
from support.exporter_bus import Bus, device
from support.exporter_process import exporting, get, parse
from support.local_cluster import wait_for

SEQUENCE = count(1)
FATAL, FOR_PROGRAMS = {48, 79, 95, 119}, {13, 31, 43, 45, 94}


def event(
    kind: str, severity: Severity = Severity.INFO, code: int = 0, uuid: str = "GPU-0", **data: Any
) -> DeviceEvent:
    return DeviceEvent(
        host="h1", agent="a", sequence=next(SEQUENCE), time_ns=1, kind=kind, severity=severity, device=uuid, code=code,
        data=data,
    )  # fmt: skip


def xid(code: int, uuid: str = "GPU-0", **data: Any) -> DeviceEvent:
    severity = Severity.RESET if code in FATAL else Severity.APPLICATION
    return event("xid", severity, code, uuid, **data)


def cleared(kind: str, uuid: str = "GPU-0", **data: Any) -> DeviceEvent:
    return event(kind, Severity.CLEARED, 0, uuid, **data)


def after(*events: DeviceEvent, at: float = 1e9) -> Xids:
    found = Xids()
    for one in events:
        found.take(one, at)
    return found


def test_a_fatal_xid_stays_until_the_device_was_reset() -> None:
    started = {"boot": "b1", "energy_millijoules": 1000}
    for stays in (
        [cleared("recovery_action")],
        [cleared("device_started", boot="b1")],
        [cleared("device_started")],
        [cleared("device_started", boot="b1", energy_millijoules=7000)],
        [cleared("device_returned", reset=False)],
        [xid(31), xid(45)],
        [event("ecc", Severity.WARNING)],
    ):
        found = after(cleared("device_started", **started), xid(95, energy_millijoules=5000), *stays)
        assert found.shown(1e9 + 1e7) == 95, [one.kind for one in stays]
    for ends in (
        [cleared("reset")],
        [cleared("device_reset")],
        [cleared("device_returned", reset=True)],
        [cleared("device_returned")],
        [event("recovery_action", Severity.RESET), cleared("recovery_action")],
        [event("recovery_action", Severity.HARDWARE), cleared("device_started", boot="b1", energy_millijoules=9000)],
        [cleared("device_started", boot="b1", energy_millijoules=10)],
        [cleared("device_started", boot="b2", energy_millijoules=9000)],
    ):
        found = after(cleared("device_started", **started), xid(95, energy_millijoules=5000), *ends)
        assert found.shown(1e9) == 0, [one.kind for one in ends]
        assert found.counts == {95: 1}


def test_one_that_leaves_the_device_well_is_shown_for_a_day() -> None:
    found = after(xid(31))
    assert (found.shown(1e9 + 86_000), found.shown(1e9 + 87_000)) == (31, 0)


def test_the_counter_of_energy_says_what_nobody_told_and_a_glitch_says_nothing() -> None:
    """A device of 500 W read at 10 Hz. A fatal Xid outlives whatever is no reset (docs/counters.md)."""
    for odd in ([0], [3, 3], [2**40], [2**40, 2**40, 1], [4_999_000] * 30, [4_000_000, 4_001_000]):
        found, now, energy = after(xid(79, energy_millijoules=5_000_000)), 1000.0, 5_000_000.0
        for at in range(4000):
            now, energy = now + 0.1, energy + 50_000
            wrong = odd[at - 20] if 20 <= at < 20 + len(odd) else energy
            assert not found.look(wrong, now), (odd, at)
        assert found.shown(1e9) == 79
    fallen = [found.look(50_000.0 * at, now + 0.1 * at) for at in range(1, 1500)]
    assert fallen.count(True) == 1
    assert found.shown(1e9) == 0
    # It counts on from a value that is a little lower: nobody has set it to 0.
    found = after(xid(79, energy_millijoules=5_000_000_000))
    assert not any(found.look(4_990_000_000.0 + 1_000 * at, 1000.0 + at) for at in range(1000))


def test_a_reset_that_samples_alone_have_told_is_not_forgotten_when_the_stream_is_read_anew() -> None:
    history, fatal = History(), xid(95, energy_millijoules=5_000_000)
    history.take(fatal, 1e9)
    found = history.of("h1", "GPU-0")
    assert found is not None
    assert not found.look(5_000_000.0, 1000.0)
    assert found.look(9_000.0, 2000.0)
    history.begin()
    history.take_stored(fatal, 1e9)
    history.end()
    found = history.of("h1", "GPU-0")
    assert found is not None
    assert (found.shown(1e9), found.counts) == (0, {95: 1})
    assert not found.look(10_000.0, 2001.0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(sorted(FATAL | FOR_PROGRAMS)) | st.just(0), max_size=30), st.data())
def test_a_stream_that_is_read_while_it_grows_tells_each_event_once(codes: list[int], data: st.DataObject) -> None:
    """However reading and telling meet, the end is that of one fold over all; 0 is a reset."""
    told = [xid(code) if code else cleared("reset") for code in codes]
    begun = data.draw(st.integers(0, len(told)))
    read = data.draw(st.integers(begun, len(told)))
    history = History()
    for one in told[:begun]:
        history.take(one, 1e9)
    history.begin()
    stored, live = list(told[:read]), list(told[begun:])
    while stored or live:
        if not live or (stored and data.draw(st.booleans())):
            history.take_stored(stored.pop(0), 1e9)
        else:
            history.take(live.pop(0), 1e9)
    history.end()
    found, right = history.of("h1", "GPU-0") or Xids(), after(*told)
    assert (found.code, found.counts) == (right.code, right.counts)


def test_the_page_has_code_text_and_counts() -> None:
    fleet = Bus()
    fleet.inventory(device(0), device(1), device(1, uuid="MIG-1", mig_parent="GPU-1", mig_profile="1g.10gb"))
    fleet.samples(["GPU-0", "GPU-1", "MIG-1"], temperature_celsius=[40.0, 41.0, None], energy_millijoules=[9, 9, None])
    for one in (xid(31), xid(31), xid(95), xid(45), xid(31, "MIG-1")):
        fleet.live.take_event("e.h1", codec.encode(one))
    series = parse(fleet.page())

    def of(name: str, uuid: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        found = [(dict(key), value) for key, value in series[name].items()]
        return [(key, value) for key, value in found if labels.items() <= key.items() and key["UUID"] == uuid]

    ((labels, value),) = of("DCGM_FI_DEV_XID_ERRORS", "GPU-0")
    assert (value, labels["err_code"], labels["err_msg"]) == (95, "95", "Uncontained ECC error")
    assert labels["hostname"] == labels["Hostname"] == "h1"
    recent = {key.get("xid"): value for key, value in of("DCGM_EXP_XID_ERRORS_COUNT", "GPU-0")}
    assert recent == {"31": 2, "45": 1, "95": 1}
    assert {key.get("xid"): value for key, value in of("DCGM_EXP_XID_ERRORS_TOTAL", "GPU-0")} == recent
    # Without any, one series says so, as dcgm-exporter's does.
    whole = [(key, value) for key, value in of("DCGM_EXP_XID_ERRORS_COUNT", "GPU-1") if "GPU_I_ID" not in key]
    assert [("xid" in key, key["window_size_in_ms"], value) for key, value in whole] == [(False, "300000", 0)]
    # Lost devices and silent hosts send no samples; what they wait for is shown all the same.
    fleet.samples(["GPU-1"], temperature_celsius=[41.0])
    assert 95 in parse(fleet.page())["DCGM_FI_DEV_XID_ERRORS"].values()
    # The whole device takes its instances with it.
    fleet.live.take_event("e.h1", codec.encode(xid(95, "GPU-1")))
    fleet.live.take_event("e.h1", codec.encode(cleared("device_reset", "GPU-1")))
    values = {(dict(key)["UUID"], value) for key, value in parse(fleet.page())["DCGM_FI_DEV_XID_ERRORS"].items()}
    assert values == {("GPU-0", 95), ("GPU-1", 0)}
    window = after(xid(31), at=1000.0)
    assert (window.within(1000.0 + WINDOW_SECONDS - 1), window.within(1000.0 + WINDOW_SECONDS)) == ({31: 1}, {})


def test_texts_are_dcgm_exporters() -> None:
    said = {0: "No Error", 13: "Graphics Engine Exception", 31: "GPU memory page fault", 48: "Double Bit ECC Error"}
    said |= {
        79: "GPU has fallen off the bus",
        119: "GSP RPC Timeout",
        72: "CE5: Unknown Error",
        172: "Uncorrectable SRAM Error",
    }
    assert {code: xids.text(code) for code in said} == said
    assert set(xids.TEXTS) == set(range(173))
    assert xids.text(9999) == xids.text(-1) == "Unknown Error"


async def test_it_outlives_a_collector_and_an_exporter(server: Any, nc: Any, tmp_path: Path) -> None:
    js = nc.jetstream()
    await ensure_layout(js)
    listed = DeviceInfo(uuid="GPU-0", host="h1", index=0, pcie_address="00000000:01:00.0")
    inventory = Inventory(host=HostInfo(name="h1"), agent="a", time_ns=1, devices=[listed])
    packed, _ = columns.pack(METRICS["temperature_celsius"], [40.0])
    batch = SampleBatch(
        host="h1", agent="a", sequence=1, source="nvml", devices=["GPU-0"],
        times_ns=columns.pack_times([time.time_ns()]), columns={"temperature_celsius": packed},
    )  # fmt: skip

    async def say(*events: DeviceEvent) -> None:
        for one in events:
            await js.publish(f"{subjects.EVENTS}.h1", codec.encode(one))

    def shown(address: str) -> set[float] | None:
        found = parse(get(f"{address}?name[]=DCGM_*")).get("DCGM_FI_DEV_XID_ERRORS")
        return None if found is None else set(found.values())

    async def seen(address: str, wanted: set[float] | None) -> bool:
        for _ in range(200):
            await nc.publish(subjects.samples_subject("h1"), codec.encode(batch))
            if await asyncio.to_thread(shown, address) == wanted:
                return True
            await asyncio.sleep(0.05)
        return False

    await js.publish(subjects.inventory_subject("h1"), codec.encode(inventory))
    await say(xid(95), xid(45), cleared("recovery_action"), cleared("device_started"))
    for run in range(2):
        with exporting(server.url, tmp_path / f"export-{run}.log") as address:
            assert await seen(address, {95.0})
            wait_for(lambda address=address: get(address.replace("/metrics", "/-/ready")) == b"ready\n")
            if run:
                await say(cleared("device_reset"))
                assert await seen(address, {0.0})
