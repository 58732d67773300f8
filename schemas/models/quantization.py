"""Bits per weight of number formats, with the scales and zero points that are stored with the weights."""

from __future__ import annotations

from typing import Final, NamedTuple

DTYPE_BITS: Final[dict[str, int]] = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint8": 8,
}  # fmt: skip
"""Bits of a number, by the name that PyTorch gives it."""
SAFETENSORS_BITS: Final[dict[str, int]] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits of a number, by its name in a safetensors header (safetensors 0.6, `Dtype`)."""


class Block(NamedTuple):
    """Block of a GGUF type.

    Attributes:
        weights: number of weights in it.
        bytes: bytes that it takes, with its scales.
    """

    weights: int
    bytes: int


GGUF_BLOCKS: Final[dict[str, Block]] = {
    "F32": Block(1, 4), "F16": Block(1, 2), "BF16": Block(1, 2), "F64": Block(1, 8),
    "I8": Block(1, 1), "I16": Block(1, 2), "I32": Block(1, 4), "I64": Block(1, 8),
    "Q4_0": Block(32, 18), "Q4_1": Block(32, 20), "Q5_0": Block(32, 22), "Q5_1": Block(32, 24),
    "Q8_0": Block(32, 34),
    "Q2_K": Block(256, 84), "Q3_K": Block(256, 110), "Q4_K": Block(256, 144), "Q5_K": Block(256, 176),
    "Q6_K": Block(256, 210), "Q8_K": Block(256, 292),
    "IQ1_S": Block(256, 50), "IQ1_M": Block(256, 56), "IQ2_XXS": Block(256, 66), "IQ2_XS": Block(256, 74),
    "IQ2_S": Block(256, 82), "IQ3_XXS": Block(256, 98), "IQ3_S": Block(256, 110), "IQ4_NL": Block(32, 18),
    "IQ4_XS": Block(256, 136), "TQ1_0": Block(256, 54), "TQ2_0": Block(256, 66), "MXFP4": Block(32, 17),
}  # fmt: skip
"""Blocks of the GGUF types (ggml's `type_traits`; `gguf.constants.GGML_QUANT_SIZES` of gguf 0.19)."""


def grouped_bits(bits: int, group: int, *, scale_bits: int = 16, zero_points: bool = True) -> float:
    """Bits per weight with one scale, and one zero point of `bits`, for each group of weights.

    GPTQ and AWQ store packed weights, packed zero points and 16-bit scales (AutoGPTQ `QuantLinear`, AutoAWQ
    `WQLinear_GEMM`); the 32-bit group index of GPTQ is one for each input row, which is less than 0.1 %.

    Args:
        bits: of a weight.
        group: weights in a group; 0 or less for one group in each row, whose scales do not count.
        scale_bits: of a scale.
        zero_points: true if each group has a zero point.
    """
    return bits if group <= 0 else bits + (scale_bits + (bits if zero_points else 0)) / group


def block_bits(bits: int, rows: int, columns: int, *, scale_bits: int = 32) -> float:
    """Bits per weight with one scale for each block, as DeepSeek-V3 stores fp8 with blocks of 128 × 128."""
    return bits + scale_bits / (rows * columns)


def gguf_bits(name: str) -> float:
    """Bits per weight of a GGUF type.

    Raises:
        KeyError: there is no such type.
    """
    block = GGUF_BLOCKS[name.upper()]
    return 8 * block.bytes / block.weights
