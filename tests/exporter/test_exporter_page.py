"""The device series: names, labels, types and units of dcgm-exporter; null values and silent hosts."""

from __future__ import annotations

import msgspec
import pytest
from corral.exporter.families import DEFAULTS, FAMILIES, choose
from corral.exporter.live import GONE_SECONDS
from corral.exporter.page import label_text
from corral.schemas import codec, subjects
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import (
    AgentReport,
    DeviceEvent,
    HostInfo,
    Inventory,
    SampleBatch,
    Severity,
)
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support.exporter_bus import LABELS, Bus, device
from support.exporter_process import parse, types


def test_a_line_is_dcgm_exporters() -> None:
    fleet = Bus()
    fleet.inventory(device(0))
    fleet.samples(["GPU-0"], gpu_utilization_percent=[98.0], memory_used_bytes=[3 * 2**20 + 5], host="h1")
    lines = fleet.page("default").decode().splitlines()
    labels = (
        'gpu="0",UUID="GPU-0",pci_bus_id="00000000:00:00.0",device="nvidia0",modelName="NVIDIA H100",'
        'Hostname="h1",hostname="h1",DCGM_FI_DRIVER_VERSION="570.1"'
    )
    assert f"DCGM_FI_DEV_GPU_UTIL{{{labels}}} 98" in lines
    assert f"DCGM_FI_DEV_FB_USED{{{labels}}} 3" in lines
    assert f'DCGM_FI_DEV_XID_ERRORS{{{labels},err_code="0",err_msg="No Error"}} 0' in lines


def test_units_and_types() -> None:
    fleet = Bus()
    fleet.inventory(device(0))
    fleet.samples(
        ["GPU-0"],
        sm_active_percent=[25.0],
        pcie_tx_bytes_per_second=[2e6],
        energy_millijoules=[2**53],
        software_thermal_slowdown_nanoseconds=[1_500_000_000],
        nvlink_rx_bytes=[1024],
        nvlink_tx_bytes=[2048],
        power_watts=[310.37],
    )
    page = fleet.page()
    values = {name: next(iter(series.values())) for name, series in parse(page).items()}
    assert values["DCGM_FI_PROF_SM_ACTIVE"] == 0.25
    assert values["DCGM_FI_DEV_PCIE_TX_THROUGHPUT"] == 2000
    assert values["DCGM_FI_PROF_PCIE_TX_BYTES"] == 2e6
    assert values["DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"] == 2**53
    assert values["DCGM_FI_DEV_POWER_USAGE"] == 310.37
    assert values["corral_software_thermal_slowdown_seconds_total"] == 1.5
    assert values["corral_nvlink_rx_bytes_total"] == 1024
    assert values["DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL"] == 3
    assert types(page)["DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"] == "counter"
    assert types(page)["DCGM_FI_DEV_PCIE_TX_THROUGHPUT"] == "counter"
    assert types(page)["DCGM_FI_DEV_POWER_USAGE"] == "gauge"


def test_the_last_tick_counts_and_null_is_no_series() -> None:
    fleet = Bus()
    fleet.inventory(device(0), device(1))
    fleet.samples(["GPU-0", "GPU-1"], temperature_celsius=[30.0, 31.0, 40.0, None], fan_percent=[None, 5.0, None, None])
    series = parse(fleet.page())
    assert {dict(key)["UUID"]: value for key, value in series["DCGM_FI_DEV_GPU_TEMP"].items()} == {"GPU-0": 40}
    assert "DCGM_FI_DEV_FAN_SPEED" not in series
    fleet.samples(["GPU-0", "GPU-1"], temperature_celsius=[40.0, 0.0])
    series = parse(fleet.page())
    assert sorted(series["DCGM_FI_DEV_GPU_TEMP"].values()) == [0, 40]


def test_mig_instances_are_their_parents_with_profile_and_id() -> None:
    fleet = Bus()
    parts = [device(3, uuid=f"MIG-{n}", mig_parent="GPU-3", mig_profile="1g.10gb", name="MIG 1g.10gb") for n in (0, 1)]
    fleet.inventory(device(3, mig_enabled=True), *parts)
    fleet.samples(["GPU-3", "MIG-0", "MIG-1"], memory_used_bytes=[2**30, 2**20, 2**21])
    found = [dict(key) for key in parse(fleet.page())["DCGM_FI_DEV_FB_USED"]]
    assert {label["UUID"] for label in found} == {"GPU-3"}
    assert {label["modelName"] for label in found} == {"NVIDIA H100"}
    instances = sorted((label["GPU_I_PROFILE"], label["GPU_I_ID"]) for label in found if "GPU_I_ID" in label)
    assert instances == [("1g.10gb", "0"), ("1g.10gb", "1")]
    # The driver's own id where the collector tells it; parts of the same instance are still series of their own.
    ids = (9, 11, 11)
    parts = [
        device(3, uuid=f"MIG-{n}", mig_parent="GPU-3", mig_profile="1g.10gb", mig_instance=number)
        for n, number in enumerate(ids)
    ]
    fleet.inventory(device(3, mig_enabled=True), *parts)
    fleet.samples(["GPU-3", "MIG-0", "MIG-1", "MIG-2"], memory_used_bytes=[2**30, 2**20, 2**21, 2**22])
    found = [dict(key) for key in parse(fleet.page())["DCGM_FI_DEV_FB_USED"]]
    assert sorted(label.get("GPU_I_ID", "") for label in found) == ["", "11", "11.2", "9"]


def test_the_silent_are_forgotten_and_the_unknown_wait() -> None:
    fleet = Bus()
    fleet.samples(["GPU-0"], temperature_celsius=[40.0])
    assert fleet.page() == b""
    fleet.inventory(device(0))
    assert "DCGM_FI_DEV_GPU_TEMP" in parse(fleet.page())
    fleet.clock.now += 59
    assert "DCGM_FI_DEV_GPU_TEMP" in parse(fleet.page())
    fleet.clock.now += 2
    assert fleet.page() == b""
    fleet.samples(["GPU-0"], temperature_celsius=[41.0])
    assert list(parse(fleet.page())["DCGM_FI_DEV_GPU_TEMP"].values()) == [41]


def test_nothing_is_kept_of_who_is_gone_for_long() -> None:
    fleet = Bus()
    live = fleet.live
    for number in range(3):
        name = f"spot-{number}"
        fleet.inventory(device(0, host=name), host=name)
        fleet.samples(["GPU-0"], host=name, temperature_celsius=[40.0])
        event = DeviceEvent(host=name, agent="a", sequence=2, time_ns=1, device="GPU-0", kind="xid", code=79)
        live.take_event(f"e.{name}", codec.encode(event))
    fleet.clock.now += 3600
    fleet.samples(["GPU-0"], host="spot-0", temperature_celsius=[41.0])
    assert list(parse(fleet.page())["DCGM_FI_DEV_GPU_TEMP"].values()) == [41], "what it has is known yet"
    fleet.clock.now += GONE_SECONDS
    fleet.inventory(device(1))
    assert fleet.page() == b""
    assert list(live._hosts) == ["h1"]
    assert live._refused == {}
    assert live._xids.of("spot-1", "GPU-0") is None
    assert fleet.live.missing() == []
    assert live._owners.owner("GPU-0") is None


def test_what_changes_is_written_anew() -> None:
    """Lines are kept while values stay: every way in which they may not."""
    fleet = Bus()
    fleet.inventory(device(0), device(1))
    fleet.samples(["GPU-0", "GPU-1"], temperature_celsius=[40.0, 40.0])
    before = fleet.page()
    assert fleet.page() == before
    fleet.samples(["GPU-1"], temperature_celsius=[40.0])
    assert [dict(key)["gpu"] for key in parse(fleet.page())["DCGM_FI_DEV_GPU_TEMP"]] == ["1"]
    fleet.samples(["GPU-0", "GPU-1"], temperature_celsius=[40.0, 40.0])
    assert fleet.page() == before
    fleet.inventory(device(0), device(1, driver="580.2"), time_ns=2)
    assert "580.2" in fleet.page().decode()
    fleet.inventory(device(0), device(1), time_ns=1)
    assert "580.2" not in fleet.page().decode(), "what comes last counts, whatever the host's clock says"
    event = {"host": "h1", "agent": "a", "sequence": 2, "time_ns": 1, "device": "GPU-1"}
    fleet.live.take_event("e.h1", codec.encode(DeviceEvent(kind="xid", code=79, **event)))
    assert sorted(parse(fleet.page())["DCGM_FI_DEV_XID_ERRORS"].values()) == [0, 79]
    fleet.live.take_event("e.h1", codec.encode(DeviceEvent(kind="reset", severity=Severity.CLEARED, **event)))
    assert set(parse(fleet.page())["DCGM_FI_DEV_XID_ERRORS"].values()) == {0}


def test_what_cannot_be_read_costs_nothing_else() -> None:
    fleet = Bus()
    fleet.inventory(device(0))
    fleet.samples(["GPU-0"], temperature_celsius=[40.0])
    good = fleet.page()
    fleet.live.take_samples(subjects.samples_subject("h1"), b"\xc1 no message")
    assert fleet.page() == good
    fleet.samples(["GPU-0"], temperature_celsius=[40.0, 41.0, 42.0])
    fleet.live.take_inventory(subjects.inventory_subject("h1"), b"")
    assert "DCGM_FI_DEV_GPU_TEMP" in parse(fleet.page())
    assert fleet.live.undecodable == 2


def test_a_host_speaks_for_itself_and_its_own_devices() -> None:
    """Neither what names another host counts, nor what a host says of another's device."""
    fleet = Bus()
    fleet.inventory(device(0))
    fleet.samples(["GPU-0"], temperature_celsius=[40.0])
    good = fleet.page()
    mine = {"agent": "a", "sequence": 1, "time_ns": 1}
    xid = DeviceEvent(host="h2", device="GPU-0", kind="xid", code=79, **mine)
    fleet.live.take_event("e.h2", codec.encode(xid))
    fleet.live.take_event("e.h2", codec.encode(msgspec.structs.replace(xid, host="h1")))
    fleet.live.take_report("r.h2", codec.encode(AgentReport(host="h1", **mine)))
    batch = SampleBatch(
        host="h1", agent="a", sequence=1, source="nvml", devices=["GPU-0"], times_ns=bytes(8),
        columns={"temperature_celsius": bytes(4)},
    )  # fmt: skip
    fleet.live.take_samples("s.h2", codec.encode(batch))
    theirs = Inventory(host=HostInfo(name="h1"), agent="a", time_ns=1, devices=[])
    fleet.live.take_inventory("i.h2", codec.encode(theirs))
    claimed = [device(0, host="h1"), device(0, host="h2")]
    for listed in claimed:
        found = Inventory(host=HostInfo(name="h2"), agent="a", time_ns=1, devices=[listed])
        fleet.live.take_inventory("i.h2", codec.encode(found))
    fleet.samples(["GPU-0"], host="h2", temperature_celsius=[99.0])
    assert fleet.page() == good
    # The board moves: its host lists it no more.
    fleet.inventory()
    fleet.live.take_inventory("i.h2", codec.encode(found))
    moved = parse(fleet.page())["DCGM_FI_DEV_GPU_TEMP"]
    assert [(dict(key)["Hostname"], value) for key, value in moved.items()] == [("h2", 99)]


def test_what_a_stream_still_has_is_older_than_what_a_host_says_meanwhile() -> None:
    fleet = Bus()
    live = fleet.live
    old = codec.encode(Inventory(host=HostInfo(name="h1"), agent="a", time_ns=9, devices=[device(0)]))
    event = {"host": "h1", "agent": "a", "sequence": 2, "time_ns": 1, "device": "GPU-1"}
    live._readings += 1  # as `catch_up` does
    fleet.inventory(device(0), device(1), time_ns=1)
    live._take_stored_inventory("i.h1", old, 1.0)
    live.take_event("e.h1", codec.encode(DeviceEvent(kind="xid", code=79, **event)))
    live._take_stored_event("e.h1", codec.encode(DeviceEvent(kind="xid", code=13, **event)), 1.0)
    fleet.samples(["GPU-0", "GPU-1"], temperature_celsius=[40.0, 41.0])
    assert sorted(parse(fleet.page())["DCGM_FI_DEV_XID_ERRORS"].values()) == [0, 79]
    # After an outage the stream may know more.
    live._readings += 1
    live._take_stored_inventory("i.h1", old, 1.0)
    assert list(parse(fleet.page())["DCGM_FI_DEV_XID_ERRORS"].values()) == [0]


@given(st.dictionaries(st.sampled_from(LABELS), st.text(st.characters(exclude_categories=["Cs"]))))
def test_labels_survive_whatever_is_in_them(labels: dict[str, str]) -> None:
    text = f"# TYPE x gauge\nx{label_text(labels)} 1\n"
    (family,) = text_string_to_metric_families(text)
    assert family.samples[0].labels == labels


def test_metrics_are_chosen_by_set_name_and_glob_and_an_unknown_one_is_refused() -> None:
    assert [family.name for family in choose(["default"])] == list(DEFAULTS)
    assert set(FAMILIES) == {family.name for family in choose(["all", "default"])}
    assert [family.name for family in choose(["DCGM_FI_DEV_GPU_U*"])] == ["DCGM_FI_DEV_GPU_UTIL"]
    with pytest.raises(ValueError, match="nonsense"):
        choose(["default", "nonsense"])


def test_every_metric_of_the_catalogue_has_a_series() -> None:
    assert {family.metric for family in FAMILIES.values()} >= set(METRICS)
    assert len({family.name for family in FAMILIES.values()}) == len(FAMILIES)


def test_memory_in_use_and_names_from_before() -> None:
    fleet = Bus()
    fleet.inventory(device(0), device(1))
    fleet.samples(
        ["GPU-0", "GPU-1"],
        memory_used_bytes=[30 * 2**30, None],
        memory_total_bytes=[80 * 2**30, 80 * 2**30],
        memory_reserved_bytes=[5 * 2**30, 5 * 2**30],
        throttle_reasons_bitmask=[4, 0x20],
        nvlink_tx_bytes_per_second=[1e9, None],
    )
    series = parse(fleet.page())
    assert list(series["DCGM_FI_DEV_FB_USED_PERCENT"].values()) == [0.4]  # used / (total - reserved), as in DCGM
    assert series["DCGM_FI_DEV_CLOCK_THROTTLE_REASONS"] == series["DCGM_FI_DEV_CLOCKS_EVENT_REASONS"]
    assert list(series["DCGM_FI_PROF_NVLINK_TX_BYTES"].values()) == [1e9]
    fleet.samples(["GPU-0"], memory_used_bytes=[2**30], memory_total_bytes=[4 * 2**30])
    assert list(parse(fleet.page())["DCGM_FI_DEV_FB_USED_PERCENT"].values()) == [0.25]
