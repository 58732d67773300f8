"""Hugging Face accelerate: a device for each module, in one process (`device_map` of `from_pretrained`).

From accelerate's guide "Handling big models for inference": a dictionary of module names, each with a device; every
module must be in it or in one of its parents.
"""

from __future__ import annotations

import json
from typing import Final

from .command import HostCommand, Offer, Task, by_host, copies, devices_of, vendors_of, visible

VERSION: Final = "1.15"
_NAMED: Final = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Phi3ForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "OlmoForCausalLM",
        "Olmo2ForCausalLM",
        "CohereForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
    }
)
"""Architectures whose modules are `model.embed_tokens`, `model.layers.N`, `model.norm` and `lm_head`."""


def device_map(task: Task) -> dict[str, int]:
    """Device of each module, by its number among the visible ones."""
    [stages] = copies(task.plan) or []
    last = len(stages) - 1
    found = {"model.embed_tokens": 0, "model.rotary_emb": 0}
    for at, stage in enumerate(stages):
        found |= {f"model.layers.{stage.first_layer + layer}": at for layer in range(stage.layers)}
    # Tied to the embedding, the head is the same tensor and must be on the same device.
    head = 0 if task.work.model.tied_embeddings else last
    return found | {"model.norm": last, "lm_head": head}


def offer(task: Task) -> Offer:
    """A command that loads the model as the plan says; accelerate itself serves no requests."""
    refusal = _refusal(task)
    if refusal:
        return Offer(server="accelerate", version=VERSION, refusal=refusal)
    [stages] = copies(task.plan) or []
    code = (
        "import json, sys; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained("
        "sys.argv[1], dtype='auto', device_map=json.loads(sys.argv[2])); print(model.hf_device_map)"
    )
    arguments = ["python", "-c", code, task.path, json.dumps(device_map(task))]
    command = HostCommand(host=stages[0].devices[0].host, environment=visible(devices_of(stages)), arguments=arguments)
    return Offer(
        server="accelerate",
        version=VERSION,
        commands=[command],
        notes=["one stage computes at a time: the time per token is that of the plan, not the throughput"],
    )


def _refusal(task: Task) -> str:
    chains = copies(task.plan)
    if task.unconverted or task.small_cache:
        return task.unconverted or task.small_cache
    if task.gguf:
        return "accelerate loads Hugging Face folders"
    if chains is None or len(chains) != 1:
        return "accelerate loads one copy, and this plan has several ways"
    [stages] = chains
    if task.plan.tensor_parallel > 1:
        return "device_map puts each module on one device, and this plan has groups of devices"
    hosts = by_host(stages)
    if hosts is None or len(hosts) > 1:
        return "accelerate's device_map is for one process, and this plan has several hosts"
    if len(vendors_of(stages)) > 1:
        return "a process is built for the devices of one vendor, and this plan has several"
    architecture = task.work.model.architecture
    if architecture not in _NAMED:
        return f"the names of the modules of {architecture or 'an unnamed architecture'} are not known"
    return ""
