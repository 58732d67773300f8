"""What does a sample cost on the wire: to encode, to decode into columns, and in bytes?

The same samples of a host with 8 devices, at one tick and at twelve ticks a message (`--batch 250ms` at 50 Hz), as

- Corral's batches: MessagePack around raw little-endian columns, decoded and joined into one array a metric;
- one MessagePack object a sample, by msgspec, decoded into structs and gathered into the same arrays;
- one JSON object a sample, by msgspec, likewise;
- one JSON object a sample, by the standard library, likewise.

All ways end on the same arrays, which is checked. The limit beside them is to copy the batches' bytes once.

    python bench/codec.py [--messages 400] [--repeat 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from corral.collectors.agent.packing import Packer
from corral.collectors.simulated.source import SimulatedSource
from corral.schemas import codec, columns
from corral.schemas.metrics import METRICS, DeviceSample
from corral.schemas.telemetry import SampleBatch

DEVICES = 8
Arrays = dict[str, np.ndarray]


def batches(messages: int, ticks: int) -> list[SampleBatch]:
    now = [1_800_000_000 * 10**9]
    source = SimulatedSource(1, DEVICES, models="H100", background=1.0, clock_ns=lambda: now[0])
    source.open(lambda event: None)
    packer = Packer(ticks)
    found: list[SampleBatch] = []
    while len(found) < messages:
        now[0] += 20_000_000
        found += [pack.batch("bench", len(found) + 1, "simulated") for pack in packer.add(source.read())]
    return found


def join(found: list[SampleBatch]) -> Arrays:
    """What a processor does: bytes are joined, values are not touched."""
    return {
        name: np.frombuffer(b"".join(batch.columns[name] for batch in found), dtype=METRICS[name].row.unit.dtype)
        for name in found[0].columns
    }


def gather(rows: list[Any], names: list[str], get: Callable[[Any, str], Any]) -> Arrays:
    return {name: np.array([get(row, name) for row in rows], dtype=METRICS[name].row.unit.dtype) for name in names}


def best(repeat: int, function: Callable[[], Any]) -> tuple[float, Any]:
    """The least time of some runs: what the machine can do when nobody disturbs it."""
    times: list[float] = []
    result = None
    for _ in range(repeat):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}, msgspec {msgspec.__version__}")
    for ticks in (1, 12):
        given = batches(options.messages, ticks)
        names = list(given[0].columns)
        size = options.messages * ticks * DEVICES
        print(
            f"\n{options.messages} messages of {ticks} tick(s) × {DEVICES} devices × {len(names)} metrics, per sample:"
        )
        print(f"{'':34} {'encode':>10} {'decode':>10} {'bytes':>8}")
        samples = [sample for batch in given for sample in columns.rows(batch)]
        expected = join(given)

        took, raw = best(options.repeat, lambda given=given: [codec.encode(batch) for batch in given])
        back, arrays = best(
            options.repeat,
            lambda raw=raw: join([codec.decode(message, SampleBatch) for message in raw]),
        )
        report("batches of columns (Corral)", took, back, raw, size)
        same(expected, arrays)
        copied, _ = best(options.repeat, lambda raw=raw: b"".join(raw))
        one = columns_one_tick(raw)

        for label, encode, decode in peers():
            took, raw = best(options.repeat, lambda encode=encode, samples=samples: [encode(s) for s in samples])
            back, arrays = best(
                options.repeat,
                lambda raw=raw, decode=decode, names=names: gather([decode(message) for message in raw], names, pick),
            )
            report(label, took, back, raw, size)
            same(expected, arrays)
        print(
            f"{'limit: copy the batches once':34} {'':>10} {copied / size * 1e6:7.3f} µs {one / ticks / DEVICES:8.0f}"
        )


def columns_one_tick(raw: list[bytes]) -> float:
    return sum(map(len, raw)) / len(raw)


def peers() -> list[tuple[str, Callable[[DeviceSample], bytes], Callable[[bytes], Any]]]:
    from_msgpack = msgspec.msgpack.Decoder(DeviceSample).decode
    from_json = msgspec.json.Decoder(DeviceSample).decode
    return [
        ("an object a sample, MessagePack", msgspec.msgpack.Encoder().encode, from_msgpack),
        ("an object a sample, msgspec JSON", msgspec.json.Encoder().encode, from_json),
        ("an object a sample, json module", lambda s: json.dumps(msgspec.to_builtins(s)).encode(), json.loads),
    ]


def pick(row: Any, name: str) -> Any:
    return row[name] if isinstance(row, dict) else getattr(row, name)


def report(label: str, encode: float, decode: float, raw: list[bytes], size: int) -> None:
    print(
        f"{label:34} {encode / size * 1e6:7.2f} µs {decode / size * 1e6:7.2f} µs {sum(map(len, raw)) / size:8.0f}",
        flush=True,
    )


def same(expected: Arrays, found: Arrays) -> None:
    for name, values in expected.items():
        assert np.array_equal(values, found[name]), name


if __name__ == "__main__":
    main()
