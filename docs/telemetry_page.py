"""How telemetry is decoded, from the catalogue: the page, and what the schema of a batch says of each column."""

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

Generated from the catalogue in `schemas/metrics.py` by `make docs`. A message on `corral.v1.samples.{host}` is one
MessagePack map, a [SampleBatch](messages.md#samplebatch). What follows is all that one needs to read it; a program in
Node that knows no more is [telemetry.mjs](../examples/node/telemetry.mjs).

## Arrays

- `devices` has D uuids. `times_ns`, each of `columns` and each of `nulls` are MessagePack `bin`: raw numbers one after
  the other, **little-endian**, without padding.
- `times_ns` are int64, so that its bytes divided by 8·D are the number of ticks, T. Every array has T·D values
  **tick by tick**: the value of device `d` at tick `t` is number `t * D + d`, read at `times_ns` of the same number.
- A column's numbers have the type of the table below, and nothing else says it: float32 and int32 are both 4 bytes
  wide. A reader leaves out a column that it does not know.
- **Null**: a value is null where the byte of the same number in `nulls[name]` is 1; what stands in the column is then
  no value. A column that is not in `nulls` has no null. A metric that is not in `columns` is null for all devices and
  ticks. A float that is not finite is null, too, and so is what the metric can't be, below *from* or above *to* in the
  table: the history has null there.
- **Defaults are left out**: `nulls` is missing where nothing is null, `version` while it is 1. So it is with every
  message that collectors publish; [the tables](messages.md#fields) have the defaults.
- The header `Content-Type` says that it is MessagePack, where an earlier collector has not left it out. The first byte
  says so, too: JSON begins with `{`, and MessagePack never does here.

## 64 bits and alignment

Times are nanoseconds since 1970 in UTC and beyond 2^53, as are `time_ns` and `started_ns` of the other messages: a
reader whose numbers are floats (JavaScript) takes them as big integers, or is wrong by up to 128 ns. int64 columns are
to be read likewise: counters of bytes and nanoseconds may pass it.

The bytes of an array begin anywhere in the message, at no multiple of 8: in JavaScript
`new BigInt64Array(bytes.buffer, bytes.byteOffset, …)` throws, and so do casts elsewhere that want alignment. Copy the
bytes first (`bytes.slice()`), or read by `DataView` with `true` for little-endian.

"""


def _limits(metric: Metric) -> dict[str, Any]:
    """What a reader is to hold values to, where the type does not."""
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
        "| column | type | bytes | `DataView` | unit | from | to | null where |",
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
        "What each means is on [the page of metrics](../metrics.md), and [where its limits come",
        "from](../metrics.md#possible-values).",
    ]
    return "\n".join(lines) + "\n"
