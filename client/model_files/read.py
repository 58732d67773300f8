"""Reads a model from a path: a folder, a `config.json`, a safetensors file or its index, a GGUF file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from ...schemas.models.description import HeaderBytes, ModelDescription
from ...schemas.models.sizes import prediction_bytes, sizes
from . import safetensors
from .config_json import describe
from .numbers import UNREADABLE, InvalidModelFile, Table, layer_count, positive, table_of

CONFIG: Final = "config.json"
MODELOPT: Final = "hf_quant_config.json"
_HUB: Final = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIG_BYTES: Final = 16 * 2**20
_TOLERANCE: Final = 0.02
"""Part by which an index may differ from the formulas before its bytes count instead."""


def read_model(path: str | Path) -> ModelDescription:
    """Describe the model at a path. Weights themselves are never read.

    Args:
        path: folder of a model, its `config.json`, a safetensors file or index beside a `config.json`, or a GGUF file.

    Raises:
        InvalidModelFile: it is none of them, truncated, malformed, or of an unknown architecture.
    """
    place = Path(path)
    if place.is_dir():
        return _folder(place)
    if not place.is_file():
        hub = " Names on Hugging Face are not looked up: download its config.json." if _HUB.fullmatch(str(path)) else ""
        raise InvalidModelFile(
            f"{place} {'is no file' if place.exists() else 'does not exist'}: give a folder with config.json, a "
            f"config.json, safetensors or GGUF file, or --params 70B --layers 80.{hub}"
        )
    if place.suffix == ".gguf":
        from .gguf_header import describe_gguf

        return describe_gguf(place)
    if place.suffix == ".safetensors" or place.name.endswith(".safetensors.index.json"):
        return _with_files(place.parent, [place] if place.suffix == ".safetensors" else None)
    config = _with_modelopt(place.parent, _config(place)) if place.name == CONFIG else _config(place)
    if place.name == CONFIG and (safetensors.INDEX in _names(place.parent) or any(place.parent.glob("*.safetensors"))):
        return _with_files(place.parent, None)
    return describe(config, place.parent.name if place.name == CONFIG else place.stem)


def read_config(text: str, name: str = "") -> ModelDescription:
    """Describe a model by the text of its `config.json` alone.

    Args:
        text: the document.
        name: name for people.

    Raises:
        InvalidModelFile: it is truncated, malformed, or of an unknown architecture.
    """
    return describe(_decoded(text, CONFIG), name)


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _folder(folder: Path) -> ModelDescription:
    if (folder / CONFIG).is_file():
        return _with_files(folder, None)
    parts = sorted(folder.glob("*.gguf"))
    if parts:
        from .gguf_header import describe_gguf

        if len(parts) > 1 and "-of-" not in parts[0].name:
            raise InvalidModelFile(f"{folder} has {len(parts)} GGUF files: name one of them")
        return describe_gguf(parts[0])
    raise InvalidModelFile(f"{folder} has neither {CONFIG} nor a GGUF file")


def _config(file: Path) -> Table:
    try:
        with file.open("rb") as source:
            data = source.read(_CONFIG_BYTES + 1)
    except OSError as error:
        raise InvalidModelFile(f"{file} can't be read: {error.strerror or error}") from None
    if len(data) > _CONFIG_BYTES:
        raise InvalidModelFile(f"{file} has more than {_CONFIG_BYTES} bytes, and is no {CONFIG}")
    return _decoded(data, str(file))


def _with_modelopt(folder: Path, config: Table) -> Table:
    """A configuration with the quantization that NVIDIA's ModelOpt writes to a file of its own."""
    file = folder / MODELOPT
    if table_of(config, "quantization_config") or not file.is_file():
        return config
    found = table_of(_config(file), "quantization")
    return {**config, "quantization_config": {**found, "quant_method": "modelopt"}} if found else config


def _decoded(data: str | bytes, what: str) -> Table:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except UNREADABLE as error:
        problem = error
    try:
        # transformers writes Infinity and NaN, which Python's own reader takes.
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidModelFile(f"{what} is no JSON object, or is truncated: {problem}")
    return cast("Table", found)


def _with_files(folder: Path, files: list[Path] | None) -> ModelDescription:
    """A model by its configuration, and by the headers of its files where they are there."""
    file = folder / CONFIG
    if not file.is_file():
        raise InvalidModelFile(f"{CONFIG} is not beside the safetensors files in {folder}: it says what headers don't")
    config, name = _with_modelopt(folder, _config(file)), folder.resolve().name
    found = [part for part in (files or safetensors.files_of(folder)) if part.is_file()]
    index = folder / safetensors.INDEX
    if files is None and index.is_file() and len(found) < len(safetensors.files_of(folder)):
        return _by_index(describe(config, name), safetensors.read_index(index).total_bytes)
    if not found:
        return describe(config, name)
    inner = {**config, **table_of(config, "text_config")}
    layers = layer_count(positive(inner, "num_hidden_layers", "n_layer", "num_layers"))
    return describe(config, name, _header(found, layers))


def _header(files: list[Path], layers: int) -> HeaderBytes:
    return safetensors.count((tensor for file in files for tensor in safetensors.tensors(file)), layers)


def _by_index(model: ModelDescription, total: int | None) -> ModelDescription:
    """A model whose index says how many bytes its files have: these count where the formulas differ from them."""
    if total is None:
        return model
    counted = sizes(model)
    whole = counted.total + prediction_bytes(model)
    if abs(whole - total) <= _TOLERANCE * total:
        return model
    scale = (total - prediction_bytes(model) - counted.embedding - counted.head - counted.other) / sum(counted.layers)
    if scale <= 0:
        raise InvalidModelFile(f"the index says {total} bytes, less than embedding and head take by {CONFIG}")
    header = HeaderBytes(
        layers=[round(size * scale) for size in counted.layers],
        embedding=counted.embedding,
        head=counted.head,
        other=counted.other,
    )
    note = f"the index has {total} bytes, and the formulas {whole}: each layer has its part of the difference"
    return msgspec.structs.replace(model, header=header, assumed=[*model.assumed, note])
