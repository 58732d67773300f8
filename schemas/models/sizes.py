"""Sizes of a model in bytes, from the numbers that describe it.

Weights are counted matrix by matrix as the architectures' sources define them (Llama: Touvron et al. 2023; Mixtral:
Jiang et al. 2024; DeepSeek-V2 and V3: arXiv 2405.04434 and 2412.19437, with `modeling_deepseek.py`). Where a header
was read, its bytes count.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from .description import Attention, ModelDescription
from .quantization import DTYPE_BITS

BATCH_TOKENS: Final = 2048
"""Tokens that a server computes at once: vLLM's default of `max_num_batched_tokens` for online serving."""
_LOGIT_BYTES: Final = 4


class LayerWeights(NamedTuple):
    """Numbers of weights of one layer.

    Attributes:
        shared: linear weights that every token uses.
        expert: linear weights of one routed expert; 0 for a dense layer.
        plain: weights that are never quantized: norms, biases, routers.
    """

    shared: int
    expert: int
    plain: int


class ModelSizes(NamedTuple):
    """Bytes of a model's weights.

    Attributes:
        layers: of each layer.
        embedding: of the token embedding.
        head: of the output head; 0 if it is the embedding.
        other: of all else that is loaded: the norm after the last layer, encoders of images.
    """

    layers: tuple[int, ...]
    embedding: int
    head: int
    other: int

    @property
    def total(self) -> int:
        """Bytes of all weights that are loaded."""
        return sum(self.layers) + self.embedding + self.head + self.other

    @property
    def last(self) -> int:
        """Bytes that the device of the last layer holds apart from layers: head (or embedding), and all else."""
        return (self.head or self.embedding) + self.other


def attention_weights(attention: Attention, hidden: int) -> tuple[int, int]:
    """Linear and plain weights of an attention block.

    Latent attention: query (down and up, or one matrix), `kv_a_proj_with_mqa`, `kv_b_proj`, output (DeepSeek-V2,
    appendix; `modeling_deepseek.py`). Any other: query, key, value, output.
    """
    latent = attention.latent
    if latent is not None:
        key = latent.nope_dim + latent.rope_dim
        heads = attention.heads
        query = (
            hidden * latent.query_rank + latent.query_rank * heads * key if latent.query_rank else hidden * heads * key
        )
        keys = hidden * (latent.kv_rank + latent.rope_dim) + latent.kv_rank * heads * (
            latent.nope_dim + latent.value_dim
        )
        return query + keys + heads * latent.value_dim * hidden, latent.query_rank + latent.kv_rank
    wide, narrow = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    plain = (wide + 2 * narrow) * attention.bias + hidden * attention.output_bias
    plain += 2 * attention.head_dim * attention.head_norms + attention.heads * attention.sinks
    return 2 * hidden * wide + 2 * hidden * narrow, plain


def layer_weights(model: ModelDescription, layer: int) -> LayerWeights:
    """Numbers of weights of a layer."""
    hidden, experts = model.hidden_size, model.experts
    linear, plain = attention_weights(model.attention, hidden)
    plain += model.norms_per_layer * hidden * (1 + model.norm_bias)
    matrices = 3 if model.gated else 2
    if experts is None or layer < experts.dense_layers:
        bias = model.intermediate_size * (matrices - 1) + hidden if model.feed_forward_bias else 0
        return LayerWeights(linear + matrices * hidden * model.intermediate_size, 0, plain + bias)
    plain += hidden * experts.count + experts.count * experts.selection_bias + hidden * experts.shared_gate
    if experts.bias:
        plain += experts.count * (experts.intermediate_size * (matrices - 1) + hidden)
    return LayerWeights(
        linear + matrices * hidden * experts.shared_intermediate_size,
        matrices * hidden * experts.intermediate_size,
        plain,
    )


def dtype_bytes(dtype: str) -> float:
    """Bytes of a number of a type; 2 for a type that is not known."""
    return DTYPE_BITS.get(dtype, 16) / 8


def linear_bytes(model: ModelDescription) -> float:
    """Bytes of one weight of the linear layers."""
    return dtype_bytes(model.dtype) if model.quantization is None else model.quantization.bits_per_weight / 8


def _shared_bytes(model: ModelDescription) -> float:
    """Bytes of one weight of the linear layers that every token uses."""
    packed = model.quantization
    return dtype_bytes(model.dtype) if packed is not None and packed.experts_only else linear_bytes(model)


def _layer_bytes(model: ModelDescription, layer: int) -> int:
    weights = layer_weights(model, layer)
    experts = model.experts.count if model.experts is not None else 0
    return round(
        weights.shared * _shared_bytes(model)
        + experts * weights.expert * linear_bytes(model)
        + weights.plain * dtype_bytes(model.dtype)
    )


def sizes(model: ModelDescription) -> ModelSizes:
    """Bytes of all weights that a server loads; layers for multi-token prediction are left out."""
    header = model.header
    if header is not None:
        return ModelSizes(tuple(header.layers), header.embedding, header.head, header.other)
    table = model.vocabulary * model.hidden_size
    all_of_it = model.quantization is not None and model.quantization.everything
    each = linear_bytes(model) if all_of_it else dtype_bytes(model.dtype)
    embedding = round(table * each)
    kinds: dict[bool, int] = {}
    dense = model.experts.dense_layers if model.experts is not None else 0
    for layer in range(model.layers):
        kinds.setdefault(layer < dense, _layer_bytes(model, layer))
    layers = tuple(kinds[layer < dense] for layer in range(model.layers))
    other = model.hidden_size * (1 + model.norm_bias) + model.other_weights
    head = 0 if model.tied_embeddings else embedding
    return ModelSizes(layers, embedding, head, round(other * dtype_bytes(model.dtype)))


def prediction_bytes(model: ModelDescription) -> int:
    """Bytes of the layers for multi-token prediction, which are in the files but need not be loaded."""
    if not model.prediction_layers:
        return 0
    plain = dtype_bytes(model.dtype)
    table = 2 * model.vocabulary * model.hidden_size * plain
    projection = 2 * model.hidden_size**2 * plain
    return round(model.prediction_layers * (_layer_bytes(model, model.layers) + table + projection))


def read_bytes(model: ModelDescription, layer: int, batch: float) -> float:
    """Bytes of weights that one iteration reads in a layer.

    Each of `batch` tokens uses `per_token` of `count` experts. With equal probabilities, an expert is used by some of
    them with probability 1 - (1 - per_token / count) ^ batch.

    Args:
        model: the model.
        layer: index of the layer.
        batch: tokens of the iteration.
    """
    stored, experts = sizes_of_layer(model, layer), model.experts
    weights = layer_weights(model, layer)
    if experts is None or not weights.expert:
        return stored
    routed = experts.count * weights.expert * linear_bytes(model)
    share = routed / (routed + weights.shared * _shared_bytes(model) + weights.plain * dtype_bytes(model.dtype))
    used = 1 - (1 - experts.per_token / experts.count) ** batch
    return stored * (1 - share + share * used)


def sizes_of_layer(model: ModelDescription, layer: int) -> int:
    """Bytes of one layer's weights."""
    return model.header.layers[layer] if model.header is not None else _layer_bytes(model, layer)


def layer_operations(model: ModelDescription, layer: int, context: float) -> float:
    """Floating-point operations of a layer for one token: 2 for each weight that it uses, and those of attention.

    Attention over a context takes 4 · context · heads · head_dim (Kaplan et al. 2020, table 1, for both products).
    """
    weights, experts = layer_weights(model, layer), model.experts
    used = weights.shared + (experts.per_token * weights.expert if experts is not None else 0)
    attention = model.attention
    width = attention.heads * attention.head_dim
    if attention.latent is not None:
        width = attention.heads * (attention.latent.kv_rank + attention.latent.rope_dim)
    return 2 * used + 4 * context * width


def kv_token_bytes(model: ModelDescription, dtype: str = "") -> float:
    """Bytes of the KV cache of one token in one layer.

    2 · kv_heads · head_dim numbers (Pope et al. 2022); for latent attention kv_rank + rope_dim (DeepSeek-V2, table 1).

    Args:
        model: the model.
        dtype: of the cache; empty for that of the weights that are not quantized.
    """
    each = dtype_bytes(dtype or model.dtype)
    attention = model.attention
    if attention.latent is not None:
        return (attention.latent.kv_rank + attention.latent.rope_dim) * each
    return 2 * attention.kv_heads * attention.head_dim * each


def kv_sequence_bytes(model: ModelDescription, tokens: int, dtype: str = "") -> float:
    """Bytes of the KV cache of one sequence in one layer, averaged over the layers: some keep only a window."""
    attention = model.attention
    windowed = min(attention.windowed_layers, model.layers) if attention.window_tokens else 0
    kept = windowed * min(tokens, attention.window_tokens) + (model.layers - windowed) * tokens
    return kv_token_bytes(model, dtype) * kept / model.layers


def activation_bytes(model: ModelDescription) -> float:
    """Bytes of the activation of one token, as one stage sends it to the next."""
    return model.hidden_size * dtype_bytes(model.dtype)


def working_bytes(model: ModelDescription, tokens: int, sequences: int) -> float:
    """Bytes of intermediate results while a server computes `tokens` at once: an estimate.

    The residual, its norm, and the widest block with its gate, by token; and logits in float32, by sequence. Servers
    measure it with a dummy batch at their start (vLLM's `profile_run`).
    """
    experts = model.experts
    widest = model.intermediate_size
    if experts is not None:
        widest = max(widest, experts.per_token * experts.intermediate_size + experts.shared_intermediate_size)
    attention = model.attention
    widest = max(3 * widest, (attention.heads + 2 * attention.kv_heads) * attention.head_dim)
    each = dtype_bytes(model.dtype if model.dtype != "float32" else "float32")
    return tokens * (2 * model.hidden_size + widest) * each + sequences * model.vocabulary * _LOGIT_BYTES
