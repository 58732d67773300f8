"""Each device has a name of its own, and one that its runtime takes, whatever uuids the driver gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from corral.collectors.amd import visible
from corral.collectors.amd.source import AmdSource
from corral.collectors.amd.visible import Node, Place, nodes, visible_ids
from corral.collectors.identity import Identities, Seat, says_something
from corral.collectors.nvml.source import NvmlSource
from corral.schemas.telemetry import DeviceInfo
from hypothesis import given
from hypothesis import strategies as st
from support.fake_amdsmi import FakeAmd, FakeAmdDevice, available, install
from support.fake_nvml import NOT_SUPPORTED, UNKNOWN, FakeDevice, FakeNvml

ZEROS = "00000000-0000-0000-0000-000000000000"
needs_amd = pytest.mark.skipif(not available(), reason="the package amdsmi is not installed (corral[amd])")
SEATS = st.lists(
    st.builds(
        Seat,
        uuid=st.sampled_from(["", ZEROS, "GPU-1", "gpu-1", "GPU-2", "00ff74b5-0000-1000-8000-000000000000"]),
        address=st.sampled_from(["", "0000:10:00.0", "0000:11:00.0"]),
        serial=st.sampled_from(["", "0x1"]),
        index=st.integers(0, 9),
    ),
    max_size=8,
)


@given(SEATS)
def test_no_two_devices_of_a_host_have_one_name_nor_any_two_hosts_a_made_one(seats: list[Seat]) -> None:
    here, there = Identities("a").names(seats), Identities("b").names(seats)
    assert len(set(here)) == len(here) == len(seats)
    assert here == Identities("a").names(seats), "the same after a reboot"
    made = {name for name in here if name.startswith("PCI-")}
    assert made.isdisjoint(there)
    assert set(here) - made <= {seat.uuid for seat in seats if says_something(seat.uuid)}


def test_a_uuid_that_was_shared_stays_no_name_while_one_of_its_devices_is_away() -> None:
    identities = Identities("a")
    one, two = (Seat(uuid="GPU-1", address=f"0000:1{n}:00.0") for n in range(2))
    first, second = identities.names([one, two])
    assert identities.names([two]) == [second]
    assert identities.names([one]) == [first]


@pytest.mark.parametrize(
    ("uuid", "says"),
    [
        (ZEROS, False),
        ("ffffffff-ffff-ffff-ffff-ffffffffffff", False),
        ("00ff74b5-0000-1000-8000-000000000000", False),  # amdsmi of a device without a serial: the product alone
        ("18ff74a1-0000-1000-8005-6bdd51e5fe21", True),
        ("GPU-00000001-0000-0000-0000-000000000000", True),
        ("", False),
    ],
)
def test_what_a_uuid_says(uuid: str, says: bool) -> None:
    assert says_something(uuid) is says


def infos(source: AmdSource | NvmlSource) -> list[DeviceInfo]:
    source.open(lambda _event: None)
    found = source.inventory()[0].devices
    (tick,) = source.read()
    source.close()
    assert tick.devices == [info.uuid for info in found]
    return found


@needs_amd
def test_virtual_functions_of_one_uuid_are_devices_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(visible, "NODES", tmp_path)
    fake = FakeAmd([FakeAmdDevice(i) for i in range(4)])
    install(fake, monkeypatch)
    for device in fake.devices[:3]:
        device.uuid = ZEROS
    fake.devices[1].processes = [(4_000_001, "train", 5, 0)]
    found = infos(AmdSource("amd-1"))
    assert len({info.uuid for info in found}) == 4
    assert found[3].uuid == fake.devices[3].uuid
    assert [info.visible_id for info in found] == ["0", "1", "2", "3"], "all say the same serial"
    assert [info.uuid for info in infos(AmdSource("amd-1"))] == [info.uuid for info in found]
    assert {info.uuid for info in infos(AmdSource("amd-2"))[:3]}.isdisjoint(info.uuid for info in found)
    source = AmdSource("amd-1")
    source.open(lambda _event: None)
    (process,) = source.processes()["amd-1"]
    source.close()
    assert process.device == found[1].uuid


def test_nvidia_devices_of_one_uuid_are_devices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml([FakeDevice(0), FakeDevice(1, uuid="GPU-clone"), FakeDevice(2, uuid="GPU-clone")])
    fake.install(monkeypatch)
    found = infos(NvmlSource("node-1", with_events=False))
    assert found[0].uuid == fake.devices[0].uuid
    assert len({info.uuid for info in found}) == 3
    assert [info.visible_id for info in found] == ["", "1", "2"]
    # One of them is lost, and is found again by its address.
    monkeypatch.setattr("corral.collectors.nvml.source.RETURN_SECONDS", 0.0)
    source = NvmlSource("node-1", with_events=False)
    source.open(lambda _event: None)
    fake.devices[2].dead = 15
    assert source.read()[0].devices == [info.uuid for info in found[:2]]
    fake.devices[2].dead = 0
    assert source.read()[0].devices == [info.uuid for info in found]
    source.close()


def test_zeros_name_no_nvidia_device_for_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml([FakeDevice(0, uuid=f"GPU-{ZEROS}")]).install(monkeypatch)
    names: set[str] = set()
    for host in ("vm-1", "vm-2"):
        source = NvmlSource(host, with_events=False)
        (info,) = infos(source)
        assert info.visible_id == "0"
        names.add(info.uuid)
    assert len(names) == 2


@pytest.mark.parametrize("code", [NOT_SUPPORTED, UNKNOWN])
def test_a_uuid_that_can_not_be_read_for_a_moment_changes_no_name(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fake = FakeNvml()
    fake.install(monkeypatch)
    source = NvmlSource("node-1", with_events=False)
    source.open(lambda _event: None)
    fake.devices[0].errors["nvmlDeviceGetUUID"] = code
    assert [info.uuid for info in source.inventory()[0].devices] == [device.uuid for device in fake.devices]
    source.close()


# -- how ROCm takes a device


def topology(root: Path, rows: dict[int, dict[str, int]]) -> Path:
    for number, values in rows.items():
        (root / str(number)).mkdir()
        (root / str(number) / "properties").write_text("".join(f"{name} {value}\n" for name, value in values.items()))
    return root


def gpu(bus: int, unique_id: int, partition: int = 0, domain: int = 0) -> dict[str, int]:
    return {
        "simd_count": 304,
        "unique_id": unique_id,
        "domain": domain,
        "location_id": bus << 8 | partition << 28,
    }


def test_the_kernel_s_nodes_say_ids_and_order(tmp_path: Path) -> None:
    cpu = {"simd_count": 0, "cpu_cores_count": 64}
    rows = {0: cpu, 1: cpu, 2: gpu(0x21, 0xA), 10: gpu(0x10, 0), 3: gpu(0x30, 0x92F01A4E5BB8C, domain=1)}
    found = nodes(topology(tmp_path, rows))
    assert [node.number for node in found] == [2, 3, 10]
    places = [  # amdsmi's order is that of addresses
        Place(index=0, address="0000:10:00.0"),
        Place(index=1, address="0000:21:00.0", unique_id=7),
        Place(index=2, address="0001:30:00.0"),
    ]
    # A device without an id of its own is known by its number.
    assert visible_ids(places, found) == ["2", "GPU-000000000000000a", "GPU-00092f01a4e5bb8c"]
    assert nodes(tmp_path / "missing") == []


def test_partitions_that_share_their_board_s_id_are_known_by_number(tmp_path: Path) -> None:
    rows = {2: gpu(0x10, 0xAB, 0), 3: gpu(0x10, 0xAB, 1), 4: gpu(0x20, 0xCD)}
    found = nodes(topology(tmp_path, rows))
    by_function = [
        Place(index=n, address=address) for n, address in enumerate(["0000:10:00.0", "0000:10:00.1", "0000:20:00.0"])
    ]
    by_node = [Place(index=n, node=node) for n, node in enumerate([3, 2, 4])]
    assert visible_ids(by_function, found) == ["0", "1", "GPU-00000000000000cd"]
    assert visible_ids(by_node, found) == ["1", "0", "GPU-00000000000000cd"]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.none() | st.integers(0, 3), st.integers(0, 2)), max_size=5), st.booleans()
)
def test_every_device_has_another_token_that_rocm_takes(
    devices: list[tuple[int, int | None, int]], known: bool
) -> None:
    places = [
        Place(index=n, rank=rank, unique_id=own, address=f"0000:1{bus}:00.0")
        for n, (bus, rank, own) in enumerate(devices)
    ]
    there = [Node(number=n + 1, unique_id=own, address=f"0000:1{bus}:00") for n, (bus, _, own) in enumerate(devices)]
    tokens = visible_ids(places, there if known else [])
    assert len(set(tokens)) == len(tokens) == len(devices)
    assert all(token.isdigit() or (len(token) == 20 and token.startswith("GPU-")) for token in tokens)
