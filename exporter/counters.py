"""Counters for Prometheus, which takes each decrease for a reset and adds what was counted since.

Readings of a counter that can't follow the last one are not shown until they have lasted (`schemas/counters.py`). The
last accepted value is shown meanwhile, and the counter goes on from there if it was not reset.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ..schemas import columns
from ..schemas.counters import MINUTE_SECONDS, Held, hold
from ..schemas.metrics import METRICS, Metric
from ..schemas.rows import Kind
from ..schemas.telemetry import SampleBatch

_COUNTERS: Final = {name: metric for name, metric in METRICS.items() if metric.row.kind is Kind.COUNTER}


class CounterState(Struct):
    """Accepted values of one counter of a host.

    Attributes:
        held: accepted value by device; `values` are newer.
        devices: the devices of `values`.
        values: readings of the last batch, if all were accepted; empty otherwise.
        read: when these arrived, in seconds.
    """

    held: dict[str, Held] = {}
    devices: Sequence[str] = ()
    values: Sequence[float] = ()
    read: float = 0.0


def filter_counters(batch: SampleBatch, counters: dict[str, CounterState], now: float) -> SampleBatch:
    """Replace the counters in the last tick of a batch by their accepted values.

    Args:
        batch: the batch as it arrived.
        counters: accepted values so far, by metric; updated in place.
        now: when the batch arrived, in seconds.
    """
    count = len(batch.devices)
    changed: dict[str, bytes] = {}
    for name, raw in batch.columns.items():
        metric = _COUNTERS.get(name)
        if metric is None:
            continue
        last = list((columns.column(batch, name) or ())[-count:])
        state = counters.setdefault(name, CounterState())
        if _all_follow(metric, state, batch.devices, last, now):
            continue
        shown = _one_by_one(metric, state, batch.devices, last, now)
        if shown != last:
            packed = columns.pack(metric, [0 if value is None else value for value in shown])
            tail = packed[0] if packed is not None else b""
            changed[name] = raw[: len(raw) - len(tail)] + tail
    return replace(batch, columns=batch.columns | changed) if changed else batch


def _all_follow(
    metric: Metric, state: CounterState, devices: Sequence[str], last: Sequence[float | None], now: float
) -> bool:
    """Accept readings in bulk if all follow the last ones, as nearly all do; False if each must be checked."""
    if not state.values or state.devices != devices or None in last:
        return False
    values: Sequence[float] = [value for value in last if value is not None]
    most = metric.row.unit.per_second
    if not all(map(operator.ge, values, state.values)):
        return False
    if most is not None:
        grown = max(map(operator.sub, values, state.values))
        if grown > most * max(now - state.read, MINUTE_SECONDS):
            return False
    state.values, state.read = values, now
    return True


def _one_by_one(
    metric: Metric, state: CounterState, devices: Sequence[str], last: Sequence[float | None], now: float
) -> list[float | None]:
    held = state.held | {
        device: Held(value, state.read) for device, value in zip(state.devices, state.values, strict=False)
    }
    for device, value in zip(devices, last, strict=True):
        if value is not None:
            held[device] = hold(held.get(device), metric, value, now)
    shown = [None if value is None else held[device].value for device, value in zip(devices, last, strict=True)]
    good = None not in shown and all(
        held[device] == Held(value or 0, now) for device, value in zip(devices, last, strict=True)
    )
    state.held, state.devices = held, list(devices)
    state.values, state.read = ([value for value in shown if value is not None] if good else ()), now
    return shown
