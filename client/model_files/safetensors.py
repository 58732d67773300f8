"""Bytes of weights by layer, from safetensors headers.

A file begins with the length of its header (8 bytes, little-endian), then the header as JSON: for each tensor its
type, shape and the offsets of its bytes (github.com/huggingface/safetensors, "Format"). Only headers are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import msgspec

from ...schemas.models.description import HeaderBytes
from .numbers import UNREADABLE, InvalidModelFile

INDEX: Final = "model.safetensors.index.json"
_MOST_HEADER: Final = 100_000_000
"""Longest header that the format allows, in bytes (safetensors, `MAX_HEADER_SIZE`)."""
_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,5})\.")
_ENCODER: Final = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|multi_modal\w*|mm_\w+)(?:\.|$)")
_EMBEDDING: Final = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings)\.")
_HEAD: Final = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.|^output\.")


class Tensor(NamedTuple):
    """A tensor in a header.

    Attributes:
        name: its name.
        bytes: that it takes.
    """

    name: str
    bytes: int


def tensors(file: Path) -> list[Tensor]:
    """Tensors of one file.

    Raises:
        InvalidModelFile: it can't be read, or its header is truncated or malformed.
    """
    try:
        with file.open("rb") as source:
            start = source.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= _MOST_HEADER:
                raise InvalidModelFile(f"{file} is no safetensors file: its header would have {length} bytes")
            header = source.read(length)
    except OSError as error:
        raise InvalidModelFile(f"{file} can't be read: {error.strerror or error}") from None
    if len(header) < length:
        raise InvalidModelFile(f"{file} is truncated: {len(header)} of the {length} bytes of its header are there")
    try:
        table = msgspec.json.decode(header, type=dict[str, Any])
    except UNREADABLE as error:
        raise InvalidModelFile(f"{file}: the header is no JSON object ({error})") from None
    return [_tensor(file, name, entry) for name, entry in table.items() if name != "__metadata__"]


def _tensor(file: Path, name: str, entry: Any) -> Tensor:
    offsets = cast("dict[str, Any]", entry).get("data_offsets") if isinstance(entry, dict) else None
    pair = cast("list[Any]", offsets) if isinstance(offsets, list) else []
    if len(pair) != 2 or not all(isinstance(at, int) for at in pair) or not 0 <= pair[0] <= pair[1]:
        raise InvalidModelFile(f"{file}: tensor {name[:80]!r} has no valid data_offsets")
    return Tensor(name, pair[1] - pair[0])


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, or all in its folder; empty without any.

    Raises:
        InvalidModelFile: the index is malformed.
    """
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    files = {folder / name for name in read_index(index).weight_map.values()}
    return sorted(file for file in files if file.parent == folder)


class Index(msgspec.Struct):
    """Index of sharded files.

    Attributes:
        weight_map: name of a tensor → its file.
        metadata: with `total_size`, the bytes of all tensors.
    """

    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all tensors; None if the index does not say it."""
        total = self.metadata.get("total_size")
        return int(total) if isinstance(total, int | float) and 0 < total < 2**53 else None


def read_index(file: Path) -> Index:
    """Read the index of sharded files.

    Raises:
        InvalidModelFile: it is malformed.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=Index)
    except (OSError, *UNREADABLE) as error:
        raise InvalidModelFile(f"{file} is no index of safetensors files: {error}") from None


def count(found: Iterable[Tensor], layers: int) -> HeaderBytes:
    """Count the bytes of tensors by layer; layers beyond the model's are for multi-token prediction, and left out.

    Raises:
        InvalidModelFile: no tensor belongs to one of the layers.
    """
    by_layer = [0] * layers
    embedding = head = other = 0
    for tensor in found:
        layer = None if _ENCODER.search(tensor.name) else _LAYER.search(tensor.name)
        if layer is not None:
            if int(layer[1]) < layers:
                by_layer[int(layer[1])] += tensor.bytes
        elif _EMBEDDING.search(tensor.name):
            embedding += tensor.bytes
        elif _HEAD.search(tensor.name):
            head += tensor.bytes
        else:
            other += tensor.bytes
    empty = [at for at, size in enumerate(by_layer) if not size]
    if empty:
        raise InvalidModelFile(
            f"{len(empty)} of {layers} layers have no tensor in the files, the first is layer {empty[0]}: are all "
            "files there?"
        )
    return HeaderBytes(layers=by_layer, embedding=embedding, head=head, other=other)
