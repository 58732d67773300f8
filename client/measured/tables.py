"""Rates of devices from AIConfigurator's tables, where `aiconfigurator-core` is installed.

NVIDIA measures matrix products of many shapes on its data-center products with vLLM's kernels, and publishes the times
under Apache 2.0 in the wheel (`systems/data/SYSTEM/gemm/vllm/VERSION/gemm_perf.parquet`: device, type, m, n, k and
milliseconds by row). The matrices of a layer are looked up by the nearest shape: a batch of a few tokens gives the
bytes of weights read a second, a prompt the operations a second.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from ...schemas.models.description import ModelDescription
from ...schemas.models.serving import DeviceRate, ServeWork
from ...schemas.models.sizes import BATCH_TOKENS

_PACKAGE: Final = "aiconfigurator_core"
_TABLES: Final = "systems/data/*/gemm/vllm/*/gemm_perf.parquet"
_MOST_TOKENS: Final = 64
"""Batch up to which reading the weights takes the time."""
_TYPES: Final = {"bfloat16": "bfloat16", "float16": "bfloat16"}
_BYTES: Final = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0}

Table = Sequence[dict[str, Any]]
"""Rows of a table."""


def installed() -> Path | None:
    """Folder of `aiconfigurator-core`; None if it is not installed. It is not imported, which would take seconds."""
    found = importlib.util.find_spec(_PACKAGE)
    return Path(found.origin).parent if found is not None and found.origin else None


def table_rates(work: ServeWork, products: Iterable[str], folder: Path) -> list[DeviceRate]:
    """Rates of those products that the tables have, for the matrices of a model; empty for a format they don't have.

    Args:
        work: the model, and the sequences at once.
        products: names of devices, as drivers report them.
        folder: of `aiconfigurator-core`.
    """
    kind = _type_of(work.model)
    wanted = set(products)
    if kind is None or not wanted or importlib.util.find_spec("pyarrow") is None:
        return []
    found: list[DeviceRate] = []
    for file in _newest(folder):
        name = _device_of(file)
        if name in wanted:
            wanted.discard(name)
            rate = _rate(work, name, file.parent.name, _rows(file, kind), kind)
            found += [] if rate is None else [rate]
    return found


def _type_of(model: ModelDescription) -> str | None:
    packed = model.quantization
    if packed is None:
        return _TYPES.get(model.dtype)
    if packed.method in ("fp8", "fbgemm_fp8"):
        return "fp8" if packed.bits_per_weight <= 8 else "fp8_block"
    return None


def _newest(folder: Path) -> list[Path]:
    """The table of the newest version for each system."""
    by_system: dict[str, Path] = {}
    for file in sorted(folder.glob(_TABLES), key=lambda file: _version(file.parent.name)):
        by_system[file.parents[3].name] = file
    return [by_system[system] for system in sorted(by_system)]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in text.split("."))


def _device_of(file: Path) -> str:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(file).iter_batches(batch_size=1, columns=["device"]):
        return str(batch.column(0)[0])
    return ""


def _rows(file: Path, kind: str) -> Table:
    from pyarrow import parquet

    columns = ["m", "n", "k", "latency"]
    return parquet.read_table(file, columns=columns, filters=[("gemm_dtype", "=", kind)]).to_pylist()


def matrices(model: ModelDescription) -> list[tuple[int, int]]:
    """Rows and columns (n, k) of a layer's matrices, as servers join them: query with key and value, gate with up."""
    attention, hidden = model.attention, model.hidden_size
    wide = attention.heads * attention.head_dim
    inner = model.intermediate_size or (model.experts.intermediate_size if model.experts is not None else hidden)
    return [
        (wide + 2 * attention.kv_heads * attention.head_dim, hidden),
        (hidden, wide),
        ((2 if model.gated else 1) * inner, hidden),
        (hidden, inner),
    ]


def _rate(work: ServeWork, name: str, version: str, rows: Table, kind: str) -> DeviceRate | None:
    decode = min(_MOST_TOKENS, work.sequences)
    read = prompt = read_seconds = operations = 0.0
    for n, k in matrices(work.model):
        few, many = _nearest(rows, n, k, decode), _nearest(rows, n, k, BATCH_TOKENS)
        if few is None or many is None:
            return None
        read += _BYTES[kind] * few["n"] * few["k"]
        read_seconds += few["latency"] / 1e3
        operations += 2.0 * many["m"] * many["n"] * many["k"]
        prompt += many["latency"] / 1e3
    if read_seconds <= 0 or prompt <= 0:
        return None
    return DeviceRate(
        device=literal(name),
        memory_bytes_per_second=read / read_seconds,
        operations_per_second=operations / prompt,
        source=f"matrix products in AIConfigurator's tables, vLLM {version}",
    )


def _nearest(rows: Table, n: int, k: int, m: int) -> dict[str, Any] | None:
    """The row of the nearest shape, and of it the nearest number of tokens, by ratios."""
    shapes = {(row["n"], row["k"]) for row in rows}
    if not shapes:
        return None
    shape = min(shapes, key=lambda one: (abs(math.log(one[0] / n)) + abs(math.log(one[1] / k)), one))
    alike = [row for row in rows if (row["n"], row["k"]) == shape and row["latency"] > 0]
    return min(alike, key=lambda row: (abs(math.log(row["m"] / m)), row["m"]), default=None)


def literal(name: str) -> str:
    """A glob that matches a name alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
