"""Differences between the architectures that `config.json` does not state as numbers.

Each is taken from the architecture's source in Hugging Face transformers (`models/NAME/modeling_NAME.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple


class Architecture(NamedTuple):
    """Properties of an architecture that its source fixes.

    Attributes:
        bias: true if query, key and value have biases where the configuration does not say.
        head_norms: true if queries and keys are normalized by head.
        norms_per_layer: norms of the hidden size in a layer.
        gated: true if the feed-forward block has a gate.
        tied: true if head and embedding are one where the configuration does not say.
        norm_bias: true if norms have biases.
        linear_bias: true if all linear layers have biases.
        sinks: true if each head has a weight that takes attention from all tokens.
        expert_bias: true if routers and experts have biases.
        windowed: windows of attention: `all` layers, `half`, five of six (`most`), or `none`.
        defaults: numbers that published configurations leave out, from the class of the configuration.
    """

    bias: bool = False
    head_norms: bool = False
    norms_per_layer: int = 2
    gated: bool = True
    tied: bool = False
    norm_bias: bool = False
    linear_bias: bool = False
    sinks: bool = False
    expert_bias: bool = False
    windowed: str = "none"
    defaults: Mapping[str, int] = MappingProxyType({})


_PLAIN: Final = Architecture()
_GEMMA3: Final = Architecture(
    norms_per_layer=4,
    head_norms=True,
    tied=True,
    windowed="most",
    defaults=MappingProxyType(
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262_208,
            "sliding_window": 4096,
            "max_position_embeddings": 131_072,
        }
    ),
)
ARCHITECTURES: Final[dict[str, Architecture]] = {
    "LlamaForCausalLM": _PLAIN,
    "MistralForCausalLM": Architecture(windowed="all"),
    "Mistral3ForConditionalGeneration": _PLAIN,
    "MixtralForCausalLM": Architecture(windowed="all"),
    "Qwen2ForCausalLM": Architecture(bias=True),
    "Qwen2MoeForCausalLM": Architecture(bias=True),
    "Qwen3ForCausalLM": Architecture(head_norms=True),
    "Qwen3MoeForCausalLM": Architecture(head_norms=True),
    "GptOssForCausalLM": Architecture(sinks=True, expert_bias=True, windowed="half"),
    "GemmaForCausalLM": Architecture(tied=True),
    "Gemma2ForCausalLM": Architecture(norms_per_layer=4, tied=True, windowed="half"),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "PhiForCausalLM": Architecture(norms_per_layer=1, gated=False, norm_bias=True, linear_bias=True),
    "Phi3ForCausalLM": Architecture(windowed="all"),
    "GraniteForCausalLM": _PLAIN,
    "GraniteMoeForCausalLM": _PLAIN,
    "OlmoForCausalLM": Architecture(norms_per_layer=0),
    "Olmo2ForCausalLM": _PLAIN,
    "CohereForCausalLM": Architecture(norms_per_layer=1, tied=True),
    "StableLmForCausalLM": Architecture(norm_bias=True),
    "Starcoder2ForCausalLM": Architecture(gated=False, norm_bias=True, linear_bias=True, tied=True),
    "InternLM2ForCausalLM": _PLAIN,
    "DeepseekV2ForCausalLM": _PLAIN,
    "DeepseekV3ForCausalLM": _PLAIN,
}
"""Architectures by their name in `architectures` of `config.json`."""
GGUF_ARCHITECTURES: Final[dict[str, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi2": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "command-r": "CohereForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "deepseek2": "DeepseekV3ForCausalLM",
}
"""Architectures by `general.architecture` of a GGUF header."""
