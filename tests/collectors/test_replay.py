"""Recordings: every sample once, at its own time; and files that are not what they should be."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from corral.collectors.replay.source import ReplaySource, guess_memory_bytes
from corral.collectors.source import EndOfData, Tick
from corral.schemas import columns
from corral.schemas.metrics import DeviceSample
from corral.schemas.telemetry import SampleBatch

GIB = 2**30
SECOND = 10**9
START = 1_800_000_000 * SECOND


class Clock:
    def __init__(self) -> None:
        self.now_ns = START

    def __call__(self) -> int:
        return self.now_ns


def rows(ticks: list[Tick]) -> list[DeviceSample]:
    found: list[DeviceSample] = []
    for tick in ticks:
        batch = SampleBatch(
            host=tick.host,
            agent="a",
            sequence=1,
            source="replay",
            devices=tick.devices,
            times_ns=tick.times_ns,
            columns=tick.columns,
            nulls=tick.nulls,
        )
        columns.check(batch)
        found += columns.rows(batch)
    return found


def play(source: ReplaySource, clock: Clock, *, step: float = 1.0, limit: int = 100_000) -> list[DeviceSample]:
    """Read it until it ends."""
    source.open(lambda event: None)
    found: list[DeviceSample] = []
    for _ in range(limit):
        try:
            ticks = list(source.read())
        except EndOfData:
            return found
        now = rows(ticks)
        # Nothing is published before it has happened.
        assert all(sample.time_ns <= clock.now_ns for sample in now)
        found += now
        clock.now_ns += int(step * SECOND)
    return found


def csv(folder: Path, text: str, name: str = "samples.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_real_recording_is_published_sample_by_sample(shared_data: Path) -> None:
    path = shared_data / "gentd26" / "gpu_samples.parquet"
    clock = Clock()
    source = ReplaySource(path, speed=3600, hosts=18, clock_ns=clock)
    inventories = source.inventory()
    by_uuid = {device.uuid: device for inventory in inventories for device in inventory.devices}
    assert len(inventories) == 18
    assert len(by_uuid) == 143
    assert {len(inventory.devices) for inventory in inventories} == {7, 8}
    found = play(source, clock)
    table = pyarrow.parquet.read_table(path)
    epoch = table["epoch_s"].to_pylist()
    # Sixty seconds of the recording are one sixtieth of a second here.
    first = min(epoch)
    expected = sorted(
        (START + (at - first) * SECOND // 3600, device.replace("-", ""), used, round(load, 3))
        for at, device, used, load in zip(
            epoch,
            table["device"].to_pylist(),
            table["memory_used_bytes"].to_pylist(),
            table["gpu_util_percent"].to_pylist(),
            strict=True,
        )
    )
    published = sorted(
        (
            sample.time_ns,
            sample.device.removeprefix("GPU-").replace("-", ""),
            sample.memory_used_bytes,
            round(sample.gpu_utilization_percent or 0, 3),
        )
        for sample in found
    )
    assert len(published) == len(expected) == 157_415
    # Float time of the division moves a sample by less than a microsecond.
    assert all(
        abs(mine[0] - theirs[0]) < 1000 and mine[1:] == theirs[1:]
        for mine, theirs in zip(published, expected, strict=True)
    )
    assert all((sample.memory_used_bytes or 0) <= by_uuid[sample.device].memory_bytes for sample in found)


def test_holes_disorder_and_our_own_names(tmp_path: Path) -> None:
    path = csv(
        tmp_path,
        "time_ns,device,host,model,gpu_utilization_percent,memory_used_bytes,power_watts,surprise\n"
        "3000000000,GPU-b,node 1,A100,30,300,,x\n"
        "1000000000,GPU-a,node 1,H100,10,100,55.5,x\n"
        "1000000000,GPU-b,node 1,A100,,200,-1,x\n"
        ",GPU-a,node 1,H100,1,1,1,x\n"
        "2000000000,,node 1,H100,1,1,1,x\n"
        "3000000000,GPU-a,node 1,H100,110,NaN,60,x\n"
        "3000000000,GPU-a,node 1,H100,12,101,61,x\n",
    )
    clock = Clock()
    source = ReplaySource(path, clock_ns=clock)
    inventory = source.inventory()[0]
    assert inventory.host.name == "node-1"
    assert [(device.uuid, device.name) for device in inventory.devices] == [("GPU-a", "H100"), ("GPU-b", "A100")]
    found = [
        (
            sample.time_ns - START,
            sample.device,
            sample.gpu_utilization_percent,
            sample.memory_used_bytes,
            sample.power_watts,
        )
        for sample in play(source, clock)
    ]
    assert found == [
        (0, "GPU-a", 10, 100, 55.5),
        (0, "GPU-b", None, 200, None),
        (2 * SECOND, "GPU-a", None, None, 60),
        (2 * SECOND, "GPU-b", 30, 300, None),
        (2 * SECOND, "GPU-a", 12, 101, 61),
    ]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_any_unit_are_times(tmp_path: Path, unit: str) -> None:
    moments = pa.array([1_700_000_000, 1_700_000_060], pa.int64())
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    scaled = pa.array([at * scale for at in moments.to_pylist()], pa.int64())
    for number, column in enumerate((scaled.cast(pa.timestamp(unit, "UTC")), scaled)):
        path = tmp_path / f"{number}.parquet"
        name = "timestamp" if number == 0 else f"epoch_{unit}"
        pyarrow.parquet.write_table(pa.table({name: column, "uuid": ["a", "a"], "power_watts": [1, 2]}), path)
        found = play(ReplaySource(path, speed=60, keep_time=True, clock_ns=(clock := Clock())), clock)
        assert [sample.time_ns for sample in found] == [1_700_000_000 * SECOND, 1_700_000_060 * SECOND]


def test_a_column_may_be_named(tmp_path: Path) -> None:
    path = csv(tmp_path, "when,card,mem\n1,0,5\n2,0,6\n")
    mapping = {"time": "when", "device": "card", "memory_used_bytes": "mem"}
    clock = Clock()
    found = play(ReplaySource(path, columns=mapping, clock_ns=clock), clock)
    assert [(sample.time_ns - START, sample.memory_used_bytes) for sample in found] == [(0, 5), (SECOND, 6)]


def test_a_loop_begins_again_one_step_after_the_end(tmp_path: Path) -> None:
    path = csv(tmp_path, "epoch_s,gpu,power_watts\n10,0,1\n20,0,2\n30,0,3\n")
    clock = Clock()
    found = play(ReplaySource(path, speed=10, loop=True, clock_ns=clock), clock, limit=9)
    assert [(sample.time_ns - START) // SECOND for sample in found] == list(range(9))
    assert [sample.power_watts for sample in found] == [1, 2, 3] * 3


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("device,power_watts\na,1\n", {}, "no column for the time.*--column time="),
        ("epoch_s,power_watts\n1,1\n", {}, "no column for the device"),
        ("epoch_s,device\n1,a\n", {}, "no column is a metric.*epoch_s, device"),
        ("epoch_s,device,power_watts\n", {}, "no rows"),
        ("epoch_s,device,power_watts\n,a,1\n1,,1\n", {}, "no row has both"),
        ("epoch_s,device,power_watts\nyesterday,a,1\n", {}, "epoch_s holds string"),
        ("epoch_s,device,power_watts\n1,a,much\n", {}, "power_watts holds string"),
        ("epoch_s,device,power_watts\n1,a,1\n", {"columns": {"power_wats": "x"}}, "did you mean power_watts"),
        ("epoch_s,device,power_watts\n1,a,1\n", {"columns": {"power_watts": "x"}}, "there is no column 'x'"),
        ("epoch_s,device,power_watts\n1,a,1\n", {"speed": 0}, "speed of 0"),
        ("epoch_s,device,power_watts\n1,a,1\n", {"hosts": 0}, "0 hosts"),
        ("a,b\n1\n2,3,4\n", {}, "can't be read"),
    ],
)
def test_a_file_that_is_no_recording_is_refused_with_what_to_do(
    tmp_path: Path, text: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ReplaySource(csv(tmp_path, text), **options)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        ReplaySource(tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match=r"\.parquet and \.csv"):
        ReplaySource(csv(tmp_path, "a", "samples.txt"))
    with pytest.raises(ValueError, match="can't be read"):
        ReplaySource(csv(tmp_path, "not parquet", "samples.parquet"))


def test_memory_is_guessed_by_the_sizes_that_are_sold() -> None:
    assert guess_memory_bytes(0) == 8 * GIB
    assert guess_memory_bytes(47 * GIB) == 48 * GIB
    assert guess_memory_bytes(48 * GIB) == 64 * GIB
    assert guess_memory_bytes(300 * GIB) == 320 * GIB
