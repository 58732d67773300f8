"""Description of a model by a few numbers that somebody knows by heart: parameters, layers, hidden size, heads."""

from __future__ import annotations

import math
import re
from typing import Final

from ...schemas.models.description import Attention, HeaderBytes, ModelDescription, Quantization
from ...schemas.models.quantization import DTYPE_BITS, GGUF_BLOCKS, gguf_bits, grouped_bits
from ...schemas.models.sizes import attention_weights, dtype_bytes
from .numbers import InvalidModelFile, checked, layer_count

_PARAMETERS: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBT]?)", re.IGNORECASE)
_SCALES: Final = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NAMES: Final = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}
_INT4_GROUP: Final = 128


def parameters(text: str) -> int:
    """Parse a number of parameters: `70B`, `1.1B`, `350M`.

    Raises:
        InvalidModelFile: it is none.
    """
    found = _PARAMETERS.fullmatch(text.strip())
    number = round(float(found[1]) * _SCALES[found[2].upper()]) if found is not None else 0
    if not 0 < number <= 10**14:
        raise InvalidModelFile(f"--params {text!r} is no number of parameters: use 70B, 1.1B or 350M")
    return number


def number_format(text: str) -> tuple[str, Quantization | None]:
    """Type of plain weights and quantization of the others, by the name of a format: `bf16`, `fp8`, `int4`, `q4_k`.

    Raises:
        InvalidModelFile: there is no such format.
    """
    name = _NAMES.get(text.lower(), text.lower())
    if name in DTYPE_BITS and DTYPE_BITS[name] >= 16 and "int" not in name:
        return name, None
    if name in ("fp8", "int8", "float8_e4m3fn"):
        return "bfloat16", Quantization(method=name, bits_per_weight=8)
    if name in ("int4", "gptq", "awq"):
        bits = grouped_bits(4, _INT4_GROUP)
        return "bfloat16", Quantization(method=name, bits_per_weight=bits)
    if name.upper() in GGUF_BLOCKS:
        return "float16", Quantization(method=name, bits_per_weight=gguf_bits(name), everything=True)
    known = ["bf16", "fp16", "fp32", "fp8", "int8", "int4", *(block.lower() for block in GGUF_BLOCKS if "Q" in block)]
    raise InvalidModelFile(f"dtype {text!r} is not known: there are {', '.join(known)}")


def described(
    count: int,
    layers: int,
    *,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    vocabulary: int = 0,
    dtype: str = "bf16",
) -> ModelDescription:
    """Describe a dense model by its number of parameters, of which each layer has the same part.

    Args:
        count: number of parameters.
        layers: number of layers.
        hidden: hidden size; by default √(parameters / (12 · layers)), since a layer has about 12 · hidden² weights
            (Kaplan et al. 2020, table 1), in steps of 128.
        heads: number of heads; by default of 128 numbers each.
        kv_heads: number of heads of keys and values; by default as many as heads, the most that the cache may need.
        head_dim: numbers in a head; by default hidden size / heads.
        vocabulary: number of tokens in the vocabulary; 0 if the embedding shall not be counted apart.
        dtype: see `number_format`.

    Raises:
        InvalidModelFile: the numbers contradict each other.
    """
    layer_count(layers)
    plain, packed = number_format(dtype)
    assumed: list[str] = []
    if hidden is None:
        hidden = max(128, round(math.sqrt(count / (12 * layers)) / 128) * 128)
        assumed.append(f"hidden size {hidden}, from parameters and layers (--hidden)")
    if heads is None:
        heads = max(1, hidden // 128)
        assumed.append(f"{heads} heads of {hidden // heads} (--heads)")
    if kv_heads is None:
        kv_heads = heads
        assumed.append(f"{kv_heads} heads of keys and values, the most that the KV cache may need (--kv-heads)")
    if kv_heads > heads or heads % kv_heads or (head_dim is None and hidden % heads):
        raise InvalidModelFile(
            f"hidden size {hidden}, {heads} heads and {kv_heads} of keys and values contradict each other: heads "
            "divide the hidden size unless --head-dim is given, and heads of keys and values divide heads"
        )
    width = head_dim or hidden // heads
    table = vocabulary * hidden
    inside = count - 2 * table
    if inside <= 0:
        raise InvalidModelFile(f"embedding and head alone have {2 * table} parameters, of {count} in all")
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=width)
    projections, _ = attention_weights(attention, hidden)
    if layers * projections > inside:
        raise InvalidModelFile(
            f"{count} parameters contradict {layers} layers of hidden size {hidden}: attention alone has "
            f"{layers * projections}"
        )
    each = dtype_bytes(plain) if packed is None else packed.bits_per_weight / 8
    edge = each if packed is None or packed.everything else dtype_bytes(plain)
    found = ModelDescription(
        layers=layers,
        hidden_size=hidden,
        vocabulary=vocabulary,
        attention=attention,
        intermediate_size=max(1, round((inside / layers - projections) / (3 * hidden))),
        dtype=plain,
        quantization=packed,
        header=HeaderBytes(
            layers=[round(inside * each / layers)] * layers,
            embedding=round(table * edge),
            head=round(table * edge),
            other=0,
        ),
        assumed=assumed,
    )
    return checked(found)
