"""Description of a transformer by the numbers that decide on its memory and its traffic.

The numbers are those of a Hugging Face `config.json`, of a GGUF header, or of options. `sizes.py` computes with them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

Size = Annotated[int, Meta(ge=0, le=2**31)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
WeightBytes = Annotated[int, Meta(ge=0, le=2**53)]
Text = Annotated[str, Meta(max_length=256)]
MAX_LAYERS = 4096
"""Most layers of a model in a request."""


class AttentionKind(StrEnum):
    """Kind of attention, which decides on the size of the KV cache."""

    MULTI_HEAD = "multi_head"
    """Each head has keys and values of its own (Vaswani et al. 2017)."""
    GROUPED_QUERY = "grouped_query"
    """Groups of heads share keys and values (Ainslie et al. 2023)."""
    MULTI_QUERY = "multi_query"
    """All heads share keys and values (Shazeer 2019)."""
    LATENT = "latent"
    """Keys and values are kept as one compressed vector for all heads (DeepSeek-V2, 2024)."""


class Latent(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Sizes of multi-head latent attention (MLA), as `config.json` names them.

    Attributes:
        kv_rank: `kv_lora_rank`, numbers of the compressed keys and values of a token.
        query_rank: `q_lora_rank`, of the compressed query; 0 if it is not compressed.
        nope_dim: `qk_nope_head_dim`, part of each key without position.
        rope_dim: `qk_rope_head_dim`, part of each key with position, which all heads share.
        value_dim: `v_head_dim`.
    """

    kv_rank: Positive
    nope_dim: Positive
    rope_dim: Size
    value_dim: Positive
    query_rank: Size = 0


class Attention(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Attention of a layer.

    Attributes:
        heads: number of query heads.
        kv_heads: number of heads of keys and values.
        head_dim: numbers in a head.
        latent: sizes of latent attention; null for any other.
        bias: true if the projections of query, key and value have biases.
        output_bias: true if the output projection has one.
        head_norms: true if queries and keys are normalized, with `head_dim` weights each.
        window_tokens: tokens that a layer with a sliding window keeps; 0 if none has one.
        windowed_layers: number of layers with such a window.
        sinks: true if each head has a weight that takes attention from all tokens (gpt-oss).
    """

    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    latent: Latent | None = None
    bias: bool = False
    output_bias: bool = False
    head_norms: bool = False
    window_tokens: Size = 0
    windowed_layers: Size = 0
    sinks: bool = False

    @property
    def kind(self) -> AttentionKind:
        """Kind of the attention."""
        if self.latent is not None:
            return AttentionKind.LATENT
        if self.kv_heads == self.heads:
            return AttentionKind.MULTI_HEAD
        return AttentionKind.MULTI_QUERY if self.kv_heads == 1 else AttentionKind.GROUPED_QUERY


class Experts(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Mixture of experts: feed-forward blocks of which a router selects some for each token.

    Attributes:
        count: number of routed experts in a layer.
        per_token: number that a token uses.
        intermediate_size: width of one expert.
        shared_intermediate_size: width of the experts that every token uses, all together; 0 for none.
        dense_layers: number of layers, from the first, that have one dense block instead.
        selection_bias: true if the router has one bias for each expert.
        shared_gate: true if the shared experts have a gate of `hidden_size` weights.
        bias: true if the matrices of each expert have biases.
    """

    count: Positive
    per_token: Positive
    intermediate_size: Positive
    shared_intermediate_size: Size = 0
    dense_layers: Size = 0
    selection_bias: bool = False
    shared_gate: bool = False
    bias: bool = False


class Quantization(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Quantization of the linear layers inside the blocks; see `quantization.py`.

    Attributes:
        method: such as `fp8`, `gptq`, `awq` or `q4_k`.
        bits_per_weight: with scales and zero points.
        everything: true if embedding and output head are quantized, too.
        experts_only: true if the matrices of routed experts alone are quantized.
    """

    method: Text
    bits_per_weight: Annotated[float, Meta(gt=0, le=64)]
    everything: bool = False
    experts_only: bool = False


class HeaderBytes(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes of weights, counted from the headers of the files that hold them.

    Attributes:
        layers: of each layer.
        embedding: of the token embedding.
        head: of the output head; 0 if it is the embedding.
        other: of all else: norms after the last layer, position embeddings, encoders of images.
    """

    layers: Annotated[list[WeightBytes], Meta(min_length=1, max_length=MAX_LAYERS)]
    embedding: WeightBytes
    head: WeightBytes
    other: WeightBytes


class ModelDescription(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A decoder-only transformer.

    Attributes:
        name: name for people, such as that of its folder.
        architecture: such as `LlamaForCausalLM`; empty if unknown.
        layers: number of decoder layers.
        hidden_size: numbers in the activation of a token.
        vocabulary: number of tokens in the vocabulary.
        attention: attention of each layer.
        intermediate_size: width of a dense feed-forward block; 0 if no layer has one.
        gated: true if such a block has a gate (three matrices rather than two).
        feed_forward_bias: true if its matrices have biases.
        experts: mixture of experts; null for a dense model.
        norms_per_layer: number of norms of `hidden_size` in a layer.
        norm_bias: true if norms have a bias, too.
        tied_embeddings: true if the output head is the embedding.
        prediction_layers: layers for multi-token prediction, each with a projection of `2 · hidden_size` to
            `hidden_size`, an embedding and a head of its own. They are in the files, but need not be loaded.
        dtype: of weights that are not quantized, such as `bfloat16`.
        quantization: of the other weights; null for none.
        context_tokens: the longest context that it was made for; 0 if unknown.
        other_weights: number of weights apart from layers, embedding and head, such as those of an encoder of images.
        converted_from: number format of its files, if the weights have to be converted to the one described here;
            empty if they are served as they are.
        header: bytes counted from headers, which then take the place of the formulas; null without headers.
        assumed: what was assumed because its source does not say it, in words.
    """

    name: Text = ""
    architecture: Text = ""
    layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
    hidden_size: Positive
    vocabulary: Size
    attention: Attention
    intermediate_size: Size = 0
    gated: bool = True
    feed_forward_bias: bool = False
    experts: Experts | None = None
    norms_per_layer: Annotated[int, Meta(ge=0, le=16)] = 2
    norm_bias: bool = False
    tied_embeddings: bool = False
    prediction_layers: Annotated[int, Meta(ge=0, le=64)] = 0
    dtype: Text = "bfloat16"
    quantization: Quantization | None = None
    context_tokens: Size = 0
    other_weights: WeightBytes = 0
    converted_from: Text = ""
    header: HeaderBytes | None = None
    assumed: Annotated[list[Text], Meta(max_length=32)] = []

    def __post_init__(self) -> None:
        """Check what the parts say about each other, also of a decoded message."""
        if self.header is not None and len(self.header.layers) != self.layers:
            raise ValueError(f"the header has {len(self.header.layers)} layers, and the model {self.layers}")
        if self.experts is not None and self.experts.per_token > self.experts.count:
            raise ValueError(f"{self.experts.per_token} experts per token of {self.experts.count}")
