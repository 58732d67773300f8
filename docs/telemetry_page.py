"""Decoding of telemetry, from the catalog: the page, and the properties of each column in the schema of a batch."""

from __future__ import annotations

from typing import Any

import metrics_table
from corral.schemas import codec
from corral.schemas import columns as wire
from corral.schemas.metrics import METRICS, Metric
from corral.schemas.telemetry import SampleBatch

ELEMENTS = {"<f4": ("float32", 4), "<i4": ("int32", 4), "<i8": ("int64", 8)}
"""By the type of the wire: its name, and the bytes of a value."""
_JAVASCRIPT = {"float32": "getFloat32", "int32": "getInt32", "int64": "getBigInt64"}


_PROSE = """\
# Decode telemetry

Generated from the catalog in `schemas/metrics.py` by `make docs`. A message on `corral.v1.samples.{host}` is one
MessagePack map, a [SampleBatch](messages.md#samplebatch). This page is sufficient to decode it;
[telemetry.mjs](../examples/node/telemetry.mjs) is a Node program that uses only this.

## Arrays

- `devices` has D uuids. `times_ns`, each of `columns` and each of `nulls` are MessagePack `bin`: raw numbers one after
  the other, **little-endian**, without padding.
- `times_ns` are int64, so the number of ticks, T, is the number of its bytes divided by 8·D. Every array has T·D values
  **tick by tick**: the value of device `d` at tick `t` has index `t * D + d`, and was read at `times_ns` of that index.
- The type of a column's values is only in the table below, not in the message: float32 and int32 are both 4 bytes wide.
  A reader ignores a column that it does not know.
- **Null**: a value is null if the byte with its index in `nulls[name]` is 1; the number in the column then has no
  meaning. A column that is not in `nulls` has no nulls. A metric that is not in `columns` is null for all devices and
  ticks. A float that is not finite is null, too, and so is an impossible value, below *from* or above *to* in the
  table: the history has null there.
- **Defaults are left out**: `nulls` is absent if nothing is null, `version` if it is 1. The same holds for every
  message that collectors publish; [the tables](messages.md#fields) have the defaults.
- The header `Content-Type` says that the message is MessagePack; earlier collectors left it out. The first byte shows
  it, too: JSON begins with `{`, and MessagePack never does here.

## 64 bits and alignment

Times are nanoseconds since 1970 in UTC and greater than 2^53, as are `time_ns` and `started_ns` of the other messages.
A reader whose numbers are floats (JavaScript) needs big integers, or is wrong by up to 128 ns. The same holds for int64
columns: counters of bytes and nanoseconds may exceed 2^53.

The bytes of an array may begin at any offset in the message, not only at multiples of 8. In JavaScript
`new BigInt64Array(bytes.buffer, bytes.byteOffset, …)` throws then, as do casts in other languages that require
alignment. Copy the bytes first (`bytes.slice()`), or read with `DataView` and `true` for little-endian.

"""


def _limits(metric: Metric) -> dict[str, Any]:
    """Limits that a reader must apply to values, in addition to the type."""
    found = {"x-minimum": metric.minimum, "x-maximum": metric.maximum}
    return {name: limit for name, limit in found.items() if limit is not None and abs(limit) < 2**63 - 1}


def columns(properties: dict[str, Any]) -> dict[str, Any]:
    """The fields of a batch that are arrays, each with the type of its values.

    Args:
        properties: of the batch's schema, as it is without.
    """
    values = {
        name: {
            "description": metric.row.help,
            "x-msgpack-type": "bin",
            "x-element-type": ELEMENTS[metric.row.unit.dtype][0],
            "x-byte-order": "little-endian",
            "x-unit": metric.row.unit.name,
            "x-null": metric.row.null,
            **_limits(metric),
        }
        for name, metric in METRICS.items()
    }
    return {
        "times_ns": {**properties["times_ns"], "x-element-type": "int64", "x-byte-order": "little-endian"},
        "columns": {**properties["columns"], "properties": values},
        "nulls": {
            **properties["nulls"],
            "additionalProperties": {**properties["nulls"]["additionalProperties"], "x-element-type": "uint8"},
        },
    }


def _example() -> SampleBatch:
    power, memory = METRICS["power_watts"], METRICS["memory_used_bytes"]
    watts, used = wire.pack(power, [300.5, 71.25]), wire.pack(memory, [2**40, None])
    assert watts is not None
    assert used is not None
    assert used[1] is not None
    return SampleBatch(
        host="node1",
        agent="0f3c",
        sequence=7,
        source="nvml",
        devices=["GPU-a", "GPU-b"],
        times_ns=wire.pack_times([1_767_225_600_123_456_789, 1_767_225_600_123_999_999]),
        columns={power.name: watts[0], memory.name: used[0]},
        nulls={memory.name: used[1]},
    )


def render() -> str:
    """The whole page."""
    data = codec.encode(_example()).hex()
    lines = [
        *_PROSE.splitlines(),
        "## An example",
        "",
        "Two devices, one tick: 300.5 and 71.25 W; 1 TiB of memory in use, and null.",
        "",
        "```text",
        *(data[at : at + 96] for at in range(0, len(data), 96)),
        "```",
        "",
        "## Columns",
        "",
        "| column | type | bytes | `DataView` | unit | from | to | null if |",
        "| --- | --- | ---: | --- | --- | ---: | ---: | --- |",
        "| `times_ns` | int64 | 8 | `getBigInt64` | nanoseconds since 1970 | – | – | never |",
    ]
    for name, metric in METRICS.items():
        kind, size = ELEMENTS[metric.row.unit.dtype]
        lines.append(
            f"| `{name}` | {kind} | {size} | `{_JAVASCRIPT[kind]}` | {metric.row.unit.name} "
            f"| {metrics_table.limit(metric.minimum)} | {metrics_table.limit(metric.maximum)} | {metric.row.null} |"
        )
    lines += [
        "| each of `nulls` | uint8 | 1 | `getUint8` | 1 for null, else 0 | 0 | 1 | never |",
        "",
        "[Metrics](../metrics.md) explains each metric, and [possible values](../metrics.md#possible-values) the",
        "limits.",
    ]
    return "\n".join(lines) + "\n"
