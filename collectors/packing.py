"""Ticks to messages: one host's ticks are joined until they are old, many or large enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..schemas.metrics import METRICS
from ..schemas.telemetry import SampleBatch
from .source import Tick

MAX_MESSAGE_BYTES: Final = 256 * 1024
"""A batch is closed before it grows beyond it; a server takes 1 MiB by default."""

_SIZES: Final = {name: int(metric.row.unit.dtype[-1]) for name, metric in METRICS.items()}


class Pack:
    """The open batch of one host.

    Attributes:
        host: the host.
        devices: of all its ticks.
        ticks: in order.
        bytes: of their columns.
    """

    __slots__ = ("bytes", "devices", "host", "ticks")

    def __init__(self, tick: Tick) -> None:
        self.host = tick.host
        self.devices = tick.devices
        self.ticks = [tick]
        self.bytes = _bytes(tick)

    @property
    def samples(self) -> int:
        """Ticks times devices."""
        return len(self.ticks) * len(self.devices)

    def batch(self, agent: str, sequence: int, source: str) -> SampleBatch:
        """The ticks as one message. A metric that only some ticks have is null in the others."""
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
    """Joins ticks of many hosts, each to its own batches.

    Args:
        ticks_per_batch: a batch is closed with so many ticks.
        max_bytes: or before its columns grow beyond it.
    """

    def __init__(self, ticks_per_batch: int, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.ticks_per_batch = max(ticks_per_batch, 1)
        self.max_bytes = max_bytes
        self._open: dict[str, Pack] = {}

    def add(self, tick: Tick) -> Iterator[Pack]:
        """Take a tick; yields the batches that it closes."""
        if not tick.devices:
            return
        pack = self._open.get(tick.host)
        if pack is not None and (pack.devices != tick.devices or pack.bytes + _bytes(tick) > self.max_bytes):
            del self._open[tick.host]
            yield pack
            pack = None
        if pack is None:
            pack = self._open[tick.host] = Pack(tick)
        else:
            pack.ticks.append(tick)
            pack.bytes += _bytes(tick)
        if len(pack.ticks) >= self.ticks_per_batch:
            del self._open[tick.host]
            yield pack

    def flush(self) -> list[Pack]:
        """Close all batches."""
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
