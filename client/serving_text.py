"""Models to serve and plans of their layers as text, for the terminal and the dashboard."""

from __future__ import annotations

from ..schemas.models.description import AttentionKind, ModelDescription
from ..schemas.models.serving import ExpectedService, PlanKind, ServePlan
from ..schemas.values.units import short_time

_ATTENTION = {
    AttentionKind.MULTI_HEAD: "multi-head attention",
    AttentionKind.GROUPED_QUERY: "grouped-query attention",
    AttentionKind.MULTI_QUERY: "multi-query attention",
    AttentionKind.LATENT: "latent attention",
}
_KINDS = {
    PlanKind.ONE_DEVICE: "one GPU",
    PlanKind.TENSOR_PARALLEL: "tensor parallel",
    PlanKind.PIPELINE: "pipeline",
    PlanKind.FLOW: "shared stages",
}


def model_line(model: ModelDescription) -> str:
    """A model in one line."""
    parts = [model.architecture or "a model", f"{model.layers} layers of {model.hidden_size}"]
    parts.append(_ATTENTION[model.attention.kind])
    if model.experts is not None:
        parts.append(f"{model.experts.per_token} of {model.experts.count} experts")
    packed = model.quantization
    parts.append(model.dtype if packed is None else f"{packed.method}, {packed.bits_per_weight:.3g} bits a weight")
    if model.tied_embeddings:
        parts.append("tied embeddings")
    return (f"{model.name}: " if model.name else "") + ", ".join(parts)


def kind(plan: ServePlan) -> str:
    """Shape of a plan in words."""
    groups = plan.tensor_parallel
    name = f"{plan.replicas} replicas" if plan.replicas > 1 else _KINDS[plan.kind]
    return f"{name} × {groups}" if groups > 1 and plan.kind is not PlanKind.TENSOR_PARALLEL else name


def layers(plan: ServePlan) -> str:
    """Layers of the stages: `17+9+5`, cut to ten stages."""
    counts = [str(stage.layers) for stage in plan.stages]
    return "+".join(counts[:10]) + ("+…" if len(counts) > 10 else "")


def devices(plan: ServePlan) -> str:
    """Number of devices by host and model: `2 H100 on a, 1 T4 on b`."""
    counts: dict[tuple[str, str], int] = {}
    for device in plan.devices:
        counts[device.model, device.host] = counts.get((device.model, device.host), 0) + 1
    listed = [f"{count} {model} on {host}" for (model, host), count in counts.items()]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def milliseconds(seconds: float | None) -> str:
    """A time in milliseconds, or in seconds from 1 s; a dash if it is unknown."""
    return "–" if seconds is None else short_time(seconds)


def expected_words(found: ExpectedService) -> str:
    """Service of a plan in simulation, in words."""
    coarse = f", {found.step_tokens} tokens at a time: it may be off by a third" if found.step_tokens > 1 else ""
    return (
        f"{found.tokens_per_second:.0f} tokens/s, {milliseconds(found.token_seconds)} per token, first token after "
        f"{milliseconds(found.first_token_seconds)}, with prompts of {found.prompt_tokens} tokens and outputs of "
        f"{found.output_tokens} (simulated with these rates{coarse})"
    )
