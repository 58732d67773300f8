"""Plans to serve a model as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.markup import escape

from ...client.server_commands.command import Offer
from ...schemas.models.description import AttentionKind, ModelDescription
from ...schemas.models.serving import FitVerdict, PlanKind, ServeFit, ServePlan, ServeWork
from ...schemas.units import format_bytes
from .. import render

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


def fit_lines(work: ServeWork, fit: ServeFit) -> Iterable[RenderableType]:
    """What is asked, the answer, and a table of the plans."""
    yield f"[bold]{escape(model_line(work.model))}[/]"
    for note in work.model.assumed:
        yield f"[yellow]assumed: {escape(note)}[/]"
    yield (
        f"[dim]{format_bytes(fit.weights_bytes)} of weights; {fit.kv_token_bytes / 1024:.1f} KiB of KV cache a token, "
        f"{format_bytes(fit.kv_bytes)} for {work.sequences} × {work.context_tokens} tokens; about "
        f"{format_bytes(fit.working_bytes)} for intermediate results on each GPU[/]"
    )
    fits = fit.verdict is not FitVerdict.NO
    yield f"[bold {'green' if fits else 'red'}]{'Fits' if fits else 'Does not fit'}[/]: {escape(fit.message)}"
    if fit.nearest:
        yield f"  nearest: {escape(fit.nearest)}"
    if fit.plans:
        yield plans_table(fit.plans)
        if fit.bound_tokens_per_second is not None:
            most = f"{fit.bound_tokens_per_second:.0f} tokens/s"
            yield f"[dim]no placement on these {fit.devices} devices exceeds {most}[/]"


def plans_table(plans: Sequence[ServePlan]) -> RenderableType:
    """Table of plans, one per line."""
    made = render.table(
        "#", "PLAN", "GPUS", "LAYERS", "TOKENS/S", "PER TOKEN", "FIRST TOKEN", "SEQUENCES", "DEVICES",
        right=("#", "GPUS", "TOKENS/S", "PER TOKEN", "FIRST TOKEN", "SEQUENCES"),
    )  # fmt: skip
    for number, plan in enumerate(plans, 1):
        made.add_row(
            str(number),
            kind(plan) + (" [yellow]![/]" if plan.warnings else ""),
            str(len(plan.devices)),
            escape(layers(plan)),
            render.number(plan.tokens_per_second, digits=1),
            _milliseconds(plan.token_seconds),
            _milliseconds(plan.first_token_seconds),
            str(plan.sequences),
            escape(devices(plan)),
        )
    return made


def plan_lines(plan: ServePlan) -> Iterable[RenderableType]:
    """A plan with the memory of each of its devices."""
    made = render.table(
        "LAYERS", "HOST", "GPU", "MODEL", "TRAFFIC", "WEIGHTS", "KV CACHE", "WORKING", "LEFT",
        right=("GPU", "TRAFFIC", "WEIGHTS", "KV CACHE", "WORKING", "LEFT"),
    )  # fmt: skip
    for stage in plan.stages:
        for device in stage.devices:
            made.add_row(
                f"{stage.first_layer}–{stage.first_layer + stage.layers - 1}",
                escape(device.host),
                str(device.index),
                escape(device.model),
                f"{stage.traffic:.0%}",
                format_bytes(device.weights_bytes),
                format_bytes(device.kv_bytes),
                format_bytes(device.working_bytes),
                format_bytes(device.left_bytes),
            )
    yield made
    for warning in plan.warnings:
        yield f"[yellow]{escape(warning)}[/]"
    yield f"[dim]rests on {escape('; '.join(plan.rests_on))}[/]"


def offer_lines(offers: Iterable[Offer]) -> Iterable[str]:
    """Commands of each server, or the reason why it has none."""
    for offer in offers:
        if offer.refusal:
            yield f"[dim]{escape(offer.server)}: not offered: {escape(offer.refusal)}[/]"
            continue
        yield f"[bold]{escape(offer.server)}[/] [dim](as of {escape(offer.version)})[/]"
        for command in offer.commands:
            yield f"  [dim]{escape(command.host)}:[/] {escape(command.line)}"
        for note in offer.notes:
            yield f"  [dim]{escape(note)}[/]"


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


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
