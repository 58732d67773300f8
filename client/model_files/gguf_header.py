"""Description of a model from the header of a GGUF file, read by the `gguf` library of llama.cpp."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...schemas.models.description import Attention, Experts, HeaderBytes, Latent, ModelDescription, Quantization
from .architectures import ARCHITECTURES, GGUF_ARCHITECTURES, Architecture
from .numbers import InvalidModelFile, checked, layer_count

if TYPE_CHECKING:
    from gguf import GGUFReader

_BLOCK: Final = re.compile(r"blk\.(\d{1,5})\.")
_MAGIC: Final = b"GGUF"
_SPLIT: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def describe_gguf(file: Path) -> ModelDescription:
    """Describe the model of a GGUF file; of a split one, whose other files lie beside it, by any part.

    Raises:
        InvalidModelFile: the file is truncated or malformed, or lacks a number.
        ModuleNotFoundError: the extra `corral[fit]` is not installed.
    """
    readers = [_open(part) for part in _parts(file)]
    first = readers[0]
    kind = _text(first, "general.architecture")
    if not kind:
        raise InvalidModelFile(f"{file} does not say its general.architecture")
    architecture = GGUF_ARCHITECTURES.get(kind, "")
    known = ARCHITECTURES.get(architecture, Architecture())

    def number(name: str, default: int | None = None) -> int:
        return _whole(file, first, f"{kind}.{name}", default)

    layers = number("block_count") - number("nextn_predict_layers", 0)
    if layers < 1:
        raise InvalidModelFile(f"{file}: {kind}.block_count is {layers}, and has to be 1 or more")
    layer_count(layers)
    hidden = number("embedding_length")
    found = [tensor for reader in readers for tensor in reader.tensors]
    header, types = _count(file, found, layers)
    table = next((tensor for tensor in found if tensor.name == "token_embd.weight"), None)
    vocabulary = int(table.shape[-1]) if table is not None else number("vocab_size", 0)
    experts = _experts(number)
    main = max(types, key=lambda name: types[name])
    found_model = ModelDescription(
        name=_text(first, "general.name") or file.stem,
        architecture=architecture or kind,
        layers=layers,
        hidden_size=hidden,
        vocabulary=vocabulary,
        attention=_attention(number, known, hidden, layers),
        intermediate_size=number("feed_forward_length", 0) if experts is None or experts.dense_layers else 0,
        gated=known.gated,
        experts=experts,
        norms_per_layer=known.norms_per_layer,
        norm_bias=known.norm_bias,
        tied_embeddings=header.head == 0,
        dtype="float16",
        quantization=Quantization(
            method=main.lower(),
            bits_per_weight=8 * sum(header.layers) / max(1, _weights(found, layers)),
            everything=True,
        ),
        context_tokens=number("context_length", 0),
        header=header,
        assumed=_assumed(kind, architecture, types),
    )
    return checked(found_model)


def _assumed(kind: str, architecture: str, types: dict[str, int]) -> list[str]:
    total = sum(types.values())
    largest = sorted(types.items(), key=lambda pair: -pair[1])[:6]
    shares = "types by bytes: " + ", ".join(f"{name} {100 * size / total:.0f} %" for name, size in largest)
    if architecture:
        return [shares]
    return [f"architecture {kind!r} is not known: its attention is taken to be like Llama's", shares]


def _parts(file: Path) -> list[Path]:
    split = _SPLIT.search(file.name)
    if split is None:
        return [file]
    stem, count = file.name[: split.start()], int(split[2])
    parts = [file.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise InvalidModelFile(f"{file} is one of {count} parts, and {missing[0]} is not there")
    return parts


def _open(file: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except OSError as error:
        raise InvalidModelFile(f"{file} can't be read: {error.strerror or error}") from None
    # The library meets a truncated or malformed header as whatever its arrays raise then.
    except Exception as error:
        raise InvalidModelFile(_unreadable(file, error)) from None


def _unreadable(file: Path, error: Exception) -> str:
    """Message about a file that the library can't read."""
    with file.open("rb") as source:
        magic = source.read(len(_MAGIC))
    if magic != _MAGIC:
        return f"{file} is no GGUF file: it begins with {magic!r}"
    return (
        f"{file} is truncated or malformed: its header, or a tensor that it names, goes beyond its "
        f"{file.stat().st_size} bytes ({type(error).__name__}: {error})"[:600]
    )


def _value(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _text(reader: GGUFReader, name: str) -> str:
    value = _value(reader, name)
    return value[:256] if isinstance(value, str) else ""


def _whole(file: Path, reader: GGUFReader, name: str, default: int | None) -> int:
    value = _value(reader, name)
    if isinstance(value, list) and value:  # one for each layer: the largest is on the safe side
        value = max(value)
    if value is None:
        if default is None:
            raise InvalidModelFile(f"{file} lacks {name}")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
        raise InvalidModelFile(f"{file}: {name} is {str(value)[:40]!r}, which is no number of this kind")
    return value


def _attention(number: Any, known: Architecture, hidden: int, layers: int) -> Attention:
    heads = max(1, number("attention.head_count"))
    width = max(1, hidden // heads)
    rank = number("attention.kv_lora_rank", 0)
    latent = None
    if rank:
        rope = number("rope.dimension_count", 64)
        key = number("attention.key_length_mla", 0) or number("attention.key_length", width)
        latent = Latent(
            kv_rank=rank,
            nope_dim=max(1, key - rope),
            rope_dim=rope,
            value_dim=number("attention.value_length_mla", 0) or number("attention.value_length", width),
            query_rank=number("attention.q_lora_rank", 0),
        )
    window = number("attention.sliding_window", 0)
    windowed = {"all": layers, "half": layers // 2, "most": layers - layers // 6}.get(known.windowed, 0)
    return Attention(
        heads=heads,
        kv_heads=max(1, number("attention.head_count_kv", heads)),
        head_dim=max(1, number("attention.key_length", width)),
        latent=latent,
        bias=known.bias,
        head_norms=known.head_norms,
        window_tokens=window if windowed else 0,
        windowed_layers=windowed if window else 0,
    )


def _experts(number: Any) -> Experts | None:
    count = number("expert_count", 0)
    if count <= 1:
        return None
    size = max(1, number("expert_feed_forward_length", 0) or number("feed_forward_length"))
    return Experts(
        count=count,
        per_token=max(1, number("expert_used_count")),
        intermediate_size=size,
        shared_intermediate_size=number("expert_shared_count", 0) * size
        or number("expert_shared_feed_forward_length", 0),
        dense_layers=number("leading_dense_block_count", 0),
    )


def _count(file: Path, found: list[Any], layers: int) -> tuple[HeaderBytes, dict[str, int]]:
    """Bytes by layer, and by type."""
    by_layer = [0] * layers
    types: dict[str, int] = {}
    embedding = head = other = 0
    for tensor in found:
        size, name = int(tensor.n_bytes), str(tensor.name)
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + size
        block = _BLOCK.match(name)
        if block is not None:
            if int(block[1]) < layers:
                by_layer[int(block[1])] += size
        elif name.startswith("token_embd."):
            embedding += size
        elif name.startswith("output."):
            head += size
        else:
            other += size
    empty = [at for at, size in enumerate(by_layer) if not size]
    if empty:
        raise InvalidModelFile(f"{file}: {len(empty)} of {layers} layers have no tensor, the first is layer {empty[0]}")
    return HeaderBytes(layers=by_layer, embedding=embedding, head=head, other=other), types


def _weights(found: list[Any], layers: int) -> int:
    """Number of weights in the layers."""
    return sum(
        int(tensor.n_elements)
        for tensor in found
        if (block := _BLOCK.match(str(tensor.name))) is not None and int(block[1]) < layers
    )
