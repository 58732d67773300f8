"""Description of a model from the `config.json` of Hugging Face transformers."""

from __future__ import annotations

import re
from typing import Any, cast

from ...schemas.models.description import Attention, Experts, HeaderBytes, Latent, ModelDescription, Quantization
from ...schemas.models.quantization import DTYPE_BITS, block_bits, grouped_bits
from ...schemas.models.sizes import sizes
from ...schemas.values.units import format_bytes
from .architectures import ARCHITECTURES, Architecture
from .numbers import InvalidModelFile, Table, checked, layer_count, positive, table_of, text, truth, whole

_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""4 bits, an 8-bit scale for 64 weights, and a float for 256 scales (QLoRA, Dettmers et al. 2023)."""
_MODELOPT_BITS = {"FP8": 8.0, "NVFP4": 4 + 8 / 16}
"""Bits of a weight; NVFP4 has an 8-bit scale for 16 weights (NVIDIA's ModelOpt)."""
_PLAIN_MODULES = re.compile(r"lm_head|embed|norm|vision|visual|mtp|(?:gate|router)(?:\.\w+)?\*?$")
"""Modules that are not quantized in the formulas either: head, embedding, routers, encoders."""
_MXFP4_BITS = 4 + 8 / 32
"""4 bits, and an 8-bit exponent for 32 weights (OCP Microscaling Formats 1.0)."""


def describe(config: Table, name: str = "", header: HeaderBytes | None = None) -> ModelDescription:
    """Describe a model.

    Args:
        config: the decoded document.
        name: name for people.
        header: bytes counted from the headers of its files, if these are there.

    Raises:
        InvalidModelFile: a number is missing or wrong, or the architecture is unknown and there is no header.
    """
    names = config.get("architectures")
    architecture = str(cast("list[Any]", names)[0])[:256] if isinstance(names, list) and names else ""
    known = ARCHITECTURES.get(architecture)
    nested = table_of(config, "text_config")
    if nested:
        config = {**config, **{key: value for key, value in nested.items() if value is not None}}
    if truth(config, "is_encoder_decoder"):
        raise InvalidModelFile(f"{architecture or 'the model'} is an encoder-decoder: only decoders are planned")
    if known is not None:
        config = {**known.defaults, **config}
    try:
        found = checked(_described(config, architecture, name, known or Architecture(), header))
    except InvalidModelFile as error:
        what = f"{architecture}: " if known is not None else f"architecture {architecture or '(none)'!r} is not known, "
        raise InvalidModelFile(f"{what}{'' if known is not None else 'and '}{error}") from None
    if known is None:
        if header is None:
            raise InvalidModelFile(_unknown(architecture, found))
        return _with(found, assumed=[f"{architecture or 'a model without architecture'} is not known: its attention is "
                                     "taken to be like Llama's, its weights are those of the headers"])  # fmt: skip
    return found


def _with(model: ModelDescription, **changes: Any) -> ModelDescription:
    fields = {name: getattr(model, name) for name in model.__struct_fields__}
    return ModelDescription(**(fields | changes))


def _unknown(architecture: str, like: ModelDescription) -> str:
    """Message about an unknown architecture: what its configuration says, and how to go on without it."""
    attention = like.attention
    return (
        f"architecture {architecture or '(none)'!r} is not known. Its configuration has {like.layers} layers of "
        f"{like.hidden_size}, {attention.heads} heads ({attention.kv_heads} of keys and values); built like Llama its "
        f"weights would take {format_bytes(sizes(like).total)}. Give the folder with its safetensors or GGUF files, "
        f"whose headers are counted, or its size: --params N --layers {like.layers} --hidden {like.hidden_size} "
        f"--heads {attention.heads} --kv-heads {attention.kv_heads}"
    )


def _described(
    config: Table, architecture: str, name: str, known: Architecture, header: HeaderBytes | None
) -> ModelDescription:
    hidden = positive(config, "hidden_size", "n_embd", "d_model")
    layers = layer_count(positive(config, "num_hidden_layers", "n_layer", "num_layers"))
    experts = _experts(config, known)
    intermediate = whole(config, "intermediate_size", "n_inner", "ffn_dim", default=0)
    if not intermediate and experts is None:
        intermediate = 4 * hidden
    dense = experts is None or experts.dense_layers > 0
    dtype = text(config, "dtype") or text(config, "torch_dtype") or "bfloat16"
    if dtype not in DTYPE_BITS:
        raise InvalidModelFile(f"torch_dtype is {dtype!r}: there are {', '.join(sorted(DTYPE_BITS))}")
    return ModelDescription(
        name=name,
        architecture=architecture,
        layers=layers,
        hidden_size=hidden,
        vocabulary=whole(config, "vocab_size"),
        attention=_attention(config, known, hidden, layers),
        intermediate_size=intermediate if dense else 0,
        gated=known.gated,
        feed_forward_bias=known.linear_bias or truth(config, "mlp_bias"),
        experts=experts,
        norms_per_layer=known.norms_per_layer,
        norm_bias=known.norm_bias,
        tied_embeddings=truth(config, "tie_word_embeddings", known.tied),
        prediction_layers=min(whole(config, "num_nextn_predict_layers", default=0), 64),
        dtype=dtype,
        quantization=_quantization(table_of(config, "quantization_config"), header),
        context_tokens=_context(config, architecture),
        other_weights=_image_weights(config, hidden) if architecture == "Gemma3ForConditionalGeneration" else 0,
        header=header,
    )


def _context(config: Table, architecture: str) -> int:
    """Longest context, as vLLM derives it (`_get_and_verify_max_len`); 0 if the configuration does not say it."""
    longest = whole(config, "max_position_embeddings", "n_positions", default=0)
    scaling = table_of(config, "rope_scaling") or table_of(config, "rope_parameters")
    kind, factor = text(scaling, "rope_type") or text(scaling, "type"), scaling.get("factor")
    if architecture.startswith("Gemma3") or kind not in ("linear", "dynamic", "yarn"):
        return longest
    if kind == "yarn":
        longest = whole(scaling, "original_max_position_embeddings", default=longest)
    return round(longest * factor) if isinstance(factor, int | float) and 1 <= factor < 2**20 else longest


def _image_weights(config: Table, hidden: int) -> int:
    """Number of weights of a SigLIP encoder with its projection (`modeling_siglip.py`, `modeling_gemma3.py`)."""
    vision = table_of(config, "vision_config")
    if not vision:
        return 0
    width, wide = positive(vision, "hidden_size"), positive(vision, "intermediate_size")
    patch = positive(vision, "patch_size")
    places = (positive(vision, "image_size") // patch) ** 2
    layer = 4 * (width * width + width) + 2 * width * wide + wide + width + 4 * width
    ends = 3 * patch * patch * width + width + places * width + 2 * width
    return positive(vision, "num_hidden_layers") * layer + ends + width * hidden + width


def _attention(config: Table, known: Architecture, hidden: int, layers: int) -> Attention:
    heads = positive(config, "num_attention_heads", "n_head")
    latent = None
    if whole(config, "kv_lora_rank", default=0):
        latent = Latent(
            kv_rank=positive(config, "kv_lora_rank"),
            nope_dim=positive(config, "qk_nope_head_dim"),
            rope_dim=whole(config, "qk_rope_head_dim"),
            value_dim=positive(config, "v_head_dim"),
            query_rank=whole(config, "q_lora_rank", default=0),
        )
    bias = truth(config, "attention_bias", truth(config, "qkv_bias", truth(config, "use_qkv_bias", known.bias)))
    window = whole(config, "sliding_window", default=0) if truth(config, "use_sliding_window", True) else 0
    return Attention(
        heads=heads,
        kv_heads=positive(config, "num_key_value_heads", default=1 if truth(config, "multi_query") else heads),
        head_dim=positive(config, "head_dim", default=max(1, hidden // heads)),
        latent=latent,
        bias=bias or known.linear_bias,
        output_bias=known.linear_bias or (truth(config, "attention_bias") and not known.bias),
        head_norms=known.head_norms,
        sinks=known.sinks,
        window_tokens=window if known.windowed != "none" else 0,
        windowed_layers=_windowed(config, known, layers) if window else 0,
    )


def _windowed(config: Table, known: Architecture, layers: int) -> int:
    types = config.get("layer_types")
    if isinstance(types, list):
        return min(layers, sum(kind == "sliding_attention" for kind in cast("list[Any]", types)))
    every = whole(config, "sliding_window_pattern", default=6) or 6
    return {"all": layers, "half": layers // 2, "most": layers - layers // every}.get(known.windowed, 0)


def _experts(config: Table, known: Architecture) -> Experts | None:
    count = whole(config, "num_local_experts", "num_experts", "n_routed_experts", default=0)
    if count <= 1:
        return None
    size = positive(config, "moe_intermediate_size", "intermediate_size")
    shared = whole(config, "n_shared_experts", default=0) * size
    return Experts(
        count=count,
        per_token=positive(config, "num_experts_per_tok", "moe_topk"),
        intermediate_size=size,
        shared_intermediate_size=shared or whole(config, "shared_expert_intermediate_size", default=0),
        dense_layers=whole(config, "first_k_dense_replace", default=0),
        selection_bias=text(config, "topk_method") == "noaux_tc" or known.expert_bias,
        bias=known.expert_bias,
        shared_gate=whole(config, "shared_expert_intermediate_size", default=0) > 0,
    )


def _quantization(table: Table, header: HeaderBytes | None) -> Quantization | None:
    try:
        return quantization(table)
    except InvalidModelFile:
        if header is None:
            raise
        return Quantization(method=text(table, "quant_method"), bits_per_weight=8)  # the header's bytes count


def quantization(table: Table) -> Quantization | None:
    """Quantization from `quantization_config`; None for an empty one.

    Raises:
        InvalidModelFile: the method is not known.
    """
    method = text(table, "quant_method").lower()
    if not method:
        return None
    if method in ("gptq", "awq", "auto-round"):
        bits = positive(table, "bits", "w_bit", default=4)
        group = table.get("group_size", table.get("q_group_size", 128))
        return Quantization(method=method, bits_per_weight=grouped_bits(bits, group if isinstance(group, int) else 128))
    if method in ("fp8", "fbgemm_fp8"):
        size = table.get("weight_block_size")
        pair = cast("list[Any]", size) if isinstance(size, list) else []
        if len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair):
            return Quantization(method="fp8", bits_per_weight=block_bits(8, pair[0], pair[1]))
        return Quantization(method="fp8", bits_per_weight=8)
    if method == "bitsandbytes":
        return Quantization(method=method, bits_per_weight=8 if truth(table, "load_in_8bit") else _NF4_BITS)
    if method == "mxfp4":
        return Quantization(method=method, bits_per_weight=_MXFP4_BITS, experts_only=True)
    if method == "compressed-tensors":
        return _compressed(table)
    if method == "modelopt":
        return modelopt(table)
    raise InvalidModelFile(
        f"quant_method {method!r} is not known (gptq, awq, fp8, bitsandbytes, mxfp4, modelopt and compressed-tensors "
        "are): give "
        "the folder with its safetensors, whose headers are counted"
    )


def modelopt(table: Table) -> Quantization:
    """Quantization by NVIDIA's ModelOpt: from `quantization_config`, or `quantization` of `hf_quant_config.json`.

    Raises:
        InvalidModelFile: the algorithm is not known, or it leaves out more than head, routers and encoders.
    """
    algorithm = text(table, "quant_algo").upper()
    bits = _MODELOPT_BITS.get(algorithm)
    if bits is None:
        raise InvalidModelFile(
            f"quant_algo {algorithm!r} is not known ({' and '.join(_MODELOPT_BITS)} are): give the folder with its "
            "safetensors, whose headers are counted"
        )
    left_out = table.get("exclude_modules") or table.get("ignore") or []
    names = [str(name) for name in cast("list[Any]", left_out)] if isinstance(left_out, list) else []
    more = [name for name in names if not _PLAIN_MODULES.search(name)]
    if more:
        raise InvalidModelFile(
            f"{algorithm} leaves {len(more)} modules as they are, such as {more[0][:80]!r}: give the folder with its "
            "safetensors, whose headers are counted"
        )
    return Quantization(method=algorithm.lower(), bits_per_weight=bits)


def _compressed(table: Table) -> Quantization:
    """The first group of a `compressed-tensors` configuration (vLLM's llm-compressor)."""
    groups = [group for group in table_of(table, "config_groups").values() if isinstance(group, dict)]
    weights = table_of(cast("Table", groups[0]), "weights") if groups else {}
    bits = positive(weights, "num_bits", default=8)
    group = whole(weights, "group_size", default=0)
    zero_points = not truth(weights, "symmetric", True)
    return Quantization(method="compressed-tensors", bits_per_weight=grouped_bits(bits, group, zero_points=zero_points))
