"""Packing of ticks into messages: a host's ticks share a batch until it holds enough readings or bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from ...schemas.metrics import METRICS
from ...schemas.telemetry import SampleBatch
from ..source import Tick

MAX_MESSAGE_BYTES: Final = 256 * 1024
"""A batch is closed before it grows beyond this size; a NATS server takes 1 MiB by default."""

_SIZES: Final = {name: int(metric.row.unit.dtype[-1]) for name, metric in METRICS.items()}


class Pack:
    """The open batch of one host.

    Attributes:
        host: name of the host.
        devices: uuids, the same in all its ticks.
        ticks: the ticks, in order.
        bytes: size of their columns, nulls and times.
        reading: number of the reading that it began with.
    """

    __slots__ = ("bytes", "devices", "host", "reading", "ticks")

    def __init__(self, tick: Tick, size: int, reading: int) -> None:
        self.host = tick.host
        self.devices = tick.devices
        self.ticks = [tick]
        self.bytes = size
        self.reading = reading

    @property
    def samples(self) -> int:
        """Number of samples: ticks times devices."""
        return len(self.ticks) * len(self.devices)

    def batch(self, agent: str, sequence: int, source: str) -> SampleBatch:
        """Join the ticks into one message. A metric that only some ticks have is null in the others."""
        ticks, count = self.ticks, len(self.devices)
        if len(ticks) == 1:
            tick = ticks[0]
            times, columns, nulls = tick.times_ns, tick.columns, tick.nulls
        else:
            times = b"".join(tick.times_ns for tick in ticks)
            columns, nulls = {}, {}
            for name in dict.fromkeys(name for tick in ticks for name in tick.columns):
                parts = [tick.columns.get(name) for tick in ticks]
                size = next(len(part) for part in parts if part is not None)
                columns[name] = b"".join(bytes(size) if part is None else part for part in parts)
                if None in parts or any(name in tick.nulls for tick in ticks):
                    nulls[name] = b"".join(
                        tick.nulls.get(name, bytes(count)) if name in tick.columns else b"\1" * count for tick in ticks
                    )
        return SampleBatch(
            host=self.host,
            agent=agent,
            sequence=sequence,
            source=source,
            devices=self.devices,
            times_ns=times,
            columns=columns,
            nulls=nulls,
        )


class Packer:
    """Packs the ticks of many hosts into batches, one open batch per host.

    Args:
        readings_per_batch: a batch is closed after this many readings of the source.
        max_bytes: a batch is also closed before it grows beyond this size.
    """

    def __init__(self, readings_per_batch: int, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.readings_per_batch = max(readings_per_batch, 1)
        self.max_bytes = max_bytes
        self._open: dict[str, Pack] = {}
        self._reading = 0

    def add(self, ticks: Iterable[Tick]) -> Iterator[Pack]:
        """Add the ticks of one reading, which may hold several of a host; yields the batches that they close."""
        self._reading += 1
        for tick in ticks:
            if not tick.devices:
                continue
            size = _bytes(tick)
            pack = self._open.get(tick.host)
            if pack is not None and (pack.devices != tick.devices or pack.bytes + size > self.max_bytes):
                yield pack
                pack = None
            if pack is None:
                self._open[tick.host] = Pack(tick, size, self._reading)
            else:
                pack.ticks.append(tick)
                pack.bytes += size
        for host in [
            host for host, pack in self._open.items() if self._reading - pack.reading + 1 >= self.readings_per_batch
        ]:
            yield self._open.pop(host)

    def flush(self) -> list[Pack]:
        """Close all open batches, and return them."""
        packs = list(self._open.values())
        self._open.clear()
        return packs


def _bytes(tick: Tick) -> int:
    return (
        len(tick.times_ns)
        + sum(map(len, tick.columns.values()))
        + sum(map(len, tick.nulls.values()))
        + sum(map(len, tick.columns))
    )
