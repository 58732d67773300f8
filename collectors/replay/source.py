"""The replay source: a recording of real samples, published again at any speed.

A recording is a Parquet or CSV file with one row per sample: a time, a device, and any of the catalog's metrics. Each
recorded device becomes a device of a replayed host, and each row is published once per round, when it is due.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ...schemas.telemetry import DeviceInfo, HostInfo, Inventory, ProcessSample
from ..source import Emit, EndOfData, Tick
from .recording import Recording, load

log = logging.getLogger("corral.collector")

MEMORY_SIZES_GIB: Final = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288)
"""Sizes that boards are sold with; see `guess_memory_bytes`."""


def guess_memory_bytes(peak_used_bytes: int) -> int:
    """Guess the total memory of a device that is not recorded: the smallest size sold that holds 1.02 times the peak.

    The 2 % are what driver and firmware keep for themselves. Above the largest size, the peak rounded up to 16 GiB.
    """
    needed = peak_used_bytes * 1.02
    for size in MEMORY_SIZES_GIB:
        if needed <= size * 2**30:
            return size * 2**30
    return -(-int(needed) // (16 * 2**30)) * 16 * 2**30


class ReplaySource:
    """Replays a recording as if it happened now.

    Args:
        path: Parquet or CSV file.
        speed: factor by which it is faster than recorded.
        loop: True to begin again at the end.
        keep_time: publish the recorded times; by default the recording begins now, its spacing divided by the speed.
        hosts: number of hosts that the devices are spread over, in the order of their names.
        prefix: prefix of host names, where the recording has no hosts.
        columns: metric name, `time` or `device` → column of the file, where they do not match by name.
        labels: labels of all hosts.
        clock_ns: returns the time, nanoseconds since the epoch.

    Raises:
        ValueError: a file that is missing, unreadable or without what a recording needs, or an impossible speed.
    """

    name = "replay"

    def __init__(
        self,
        path: Path,
        *,
        speed: float = 1.0,
        loop: bool = False,
        keep_time: bool = False,
        hosts: int = 1,
        prefix: str = "replay",
        columns: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        if not 0 < speed <= 1e9:
            raise ValueError(f"a speed of {speed:g} is not possible: write a number above 0, such as --speed 60")
        if hosts < 1:
            raise ValueError(f"{hosts} hosts can't hold the devices: write --hosts 1 or more")
        self._recording = load(path, dict(columns or {}))
        self._tell()
        self._speed = speed
        self._loop = loop
        self._keep_time = keep_time
        self._clock_ns = clock_ns
        self._layout = _Layout(self._recording, hosts, prefix, dict(labels or {}))
        self._started_ns: int | None = None
        self._next = 0
        self._round = 0
        self._max_rows = len(self._recording.times_ns)

    def open(self, emit: Emit) -> None:
        """Start the replay now; after `close`, go on with the rows that were not read yet."""
        if self._started_ns is None:
            self._started_ns = self._clock_ns()

    def inventory(self) -> Sequence[Inventory]:
        """Inventories of the replayed hosts."""
        return self._layout.inventories(self._clock_ns())

    def read(self) -> Sequence[Tick]:
        """Read the samples that are due by now and were not read yet; several ticks per host where several are due.

        Raises:
            EndOfData: all were read, and it is not to begin again.
        """
        recording = self._recording
        assert self._started_ns is not None
        due = self._position(self._clock_ns())
        if self._next >= len(recording.times_ns):
            if not self._loop:
                raise EndOfData
            self._next, self._round = 0, self._round + 1
            due = self._position(self._clock_ns())
        end = int(np.searchsorted(recording.times_ns, due, side="right"))
        end = min(max(end, self._next), self._next + self._max_rows)
        if end == self._next:
            return []
        rows = slice(self._next, end)
        self._next = end
        return self._layout.ticks(rows, self._published(recording.times_ns[rows]))

    def limit_read(self, max_bytes: int) -> None:
        """Limit one reading to so many bytes, but at least one row; rows beyond it come with the next reading."""
        columns = self._recording.columns.values()
        row_bytes = 8 + sum(column.values.itemsize + 1 for column in columns)
        # Half for heads and names: where hosts are small, they outweigh the values.
        self._max_rows = max(max_bytes // (2 * row_bytes), 1)

    def processes(self) -> dict[str, list[ProcessSample]]:
        """Return no processes: a recording has none."""
        return {}

    def close(self) -> None:
        """Do nothing: the source holds no resources."""

    def _tell(self) -> None:
        recording = self._recording
        log.info(
            "%s: %d samples of %d devices over %.0f s",
            recording.path,
            len(recording.times_ns),
            len(recording.devices),
            recording.span_ns / 1e9,
        )
        if recording.left_out:
            log.warning("%s: %d rows without a time or a device are left out", recording.path, recording.left_out)
        if recording.unsorted:
            log.warning("%s: the times are not in order; they are sorted", recording.path)

    def _position(self, now_ns: int) -> int:
        """The recorded time that corresponds to the present, in nanoseconds."""
        assert self._started_ns is not None
        elapsed = (now_ns - self._started_ns) * self._speed - self._round * self._recording.span_ns
        return int(self._recording.times_ns[0]) + int(elapsed)

    def _published(self, recorded: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self._keep_time:
            return recorded + self._round * self._recording.span_ns
        assert self._started_ns is not None
        offset = recorded - self._recording.times_ns[0] + self._round * self._recording.span_ns
        return self._started_ns + (offset / self._speed).astype(np.int64)


class _Layout:
    """Assignment of recorded devices to hosts, and conversion of rows to ticks."""

    def __init__(self, recording: Recording, hosts: int, prefix: str, labels: dict[str, str]) -> None:
        self._recording = recording
        self._labels = labels
        count = len(recording.devices)
        hosts = min(hosts, count)
        width = max(4, len(str(hosts)))
        if recording.hosts is not None:
            names = list(dict.fromkeys(recording.hosts))
            self._host_of = np.array([names.index(host) for host in recording.hosts], dtype=np.int64)
        else:
            names = [f"{prefix}-{number:0{width}d}" for number in range(1, hosts + 1)]
            # Neighbors stay together, and hosts differ by one device at most.
            self._host_of = np.arange(count, dtype=np.int64) * hosts // count
        self._names = names
        self._uuids = [_uuid(device) for device in recording.devices]

    def inventories(self, now_ns: int) -> list[Inventory]:
        recording = self._recording
        found: list[Inventory] = []
        for number, name in enumerate(self._names):
            mine = np.flatnonzero(self._host_of == number).tolist()
            devices = [
                DeviceInfo(
                    uuid=self._uuids[at],
                    host=name,
                    index=index,
                    name=recording.models[at] if recording.models is not None else "replayed GPU",
                    memory_bytes=recording.memory_bytes[at] or guess_memory_bytes(recording.peak_used_bytes[at]),
                )
                for index, at in enumerate(mine)
            ]
            found.append(
                Inventory(
                    host=HostInfo(
                        name=name,
                        address=f"{name}.replay",
                        cpus=16 * len(devices),
                        memory_bytes=len(devices) * 128 * 2**30,
                        labels={"replay": recording.path.stem[:64], **self._labels},
                    ),
                    agent="",
                    time_ns=now_ns,
                    devices=devices,
                    source="replay",
                )
            )
        return found

    def ticks(self, rows: slice, times_ns: npt.NDArray[np.int64]) -> list[Tick]:
        """Convert rows, in order of time, to ticks: each tick of a host has at most one row per device."""
        recording = self._recording
        devices = recording.device[rows]
        hosts = self._host_of[devices]
        ticks: list[Tick] = []
        order = np.argsort(hosts, kind="stable")
        edges = np.flatnonzero(np.diff(hosts[order])) + 1
        for part in np.split(order, edges):
            host = self._names[int(hosts[part[0]])]
            for group in _rounds(devices[part]):
                picked = part[group]
                # The same devices in the same order from tick to tick, so that ticks share messages.
                picked = picked[np.argsort(devices[picked], kind="stable")]
                ticks.append(self._tick(host, devices[picked], times_ns[picked], picked + rows.start))
        return ticks

    def _tick(
        self, host: str, devices: npt.NDArray[np.int64], times_ns: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> Tick:
        columns: dict[str, bytes] = {}
        nulls: dict[str, bytes] = {}
        for name, column in self._recording.columns.items():
            missing = column.nulls[rows]
            if missing.all():
                continue
            columns[name] = column.values[rows].tobytes()
            if missing.any():
                nulls[name] = missing.tobytes()
        return Tick(
            host=host,
            devices=[self._uuids[at] for at in devices.tolist()],
            times_ns=times_ns.astype("<i8").tobytes(),
            columns=columns,
            nulls=nulls,
        )


def _rounds(devices: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Split positions into groups in which no device comes twice: the first, second, … row of each in this read."""
    order = np.argsort(devices, kind="stable")
    sorted_devices = devices[order]
    starts = np.flatnonzero(np.r_[True, sorted_devices[1:] != sorted_devices[:-1]])
    rank = np.arange(len(devices)) - np.repeat(starts, np.diff(np.r_[starts, len(devices)]))
    turn = np.empty(len(devices), dtype=np.int64)
    turn[order] = rank
    by_turn = np.argsort(turn, kind="stable")
    edges = np.flatnonzero(np.diff(turn[by_turn])) + 1
    return np.split(by_turn, edges)


def _uuid(device: str) -> str:
    """Uuid of a recorded device: its name where that is one, else one made of it."""
    if device.startswith(("GPU-", "MIG-")):
        return device
    try:
        return f"GPU-{uuid.UUID(device)}"
    except ValueError:
        return f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, device)}"
