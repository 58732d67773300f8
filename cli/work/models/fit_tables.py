"""Plans to serve a model as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.markup import escape

from ....client.server_commands.command import Offer
from ....client.serving_text import devices, expected_words, kind, layers, milliseconds, model_line
from ....schemas.models.serving import FitVerdict, ServeFit, ServePlan, ServeWork
from ....schemas.values.units import format_bytes
from ... import render


def fit_lines(work: ServeWork, fit: ServeFit) -> Iterable[RenderableType]:
    """Lines with the question, the answer, and a table of the plans."""
    yield f"[bold]{escape(model_line(work.model))}[/]"
    for note in work.model.assumed:
        yield f"[yellow]assumed: {escape(note)}[/]"
    made_for = work.model.context_tokens
    if made_for and work.context_tokens > made_for:
        yield f"[yellow]the model was made for {made_for} tokens, less than the context of {work.context_tokens}[/]"
    yield (
        f"[dim]{format_bytes(fit.weights_bytes)} of weights; {fit.kv_token_bytes / 1024:.1f} KiB of KV cache a token, "
        f"{format_bytes(fit.kv_bytes)} for {work.sequences} × {work.context_tokens} tokens; about "
        f"{format_bytes(fit.working_bytes)} for intermediate results on each GPU[/]"
    )
    fits = fit.verdict is not FitVerdict.NO
    said = fit.message.removeprefix("it does not fit: ").removeprefix("it fits ")
    yield f"[bold {'green' if fits else 'red'}]{'Fits' if fits else 'Does not fit:'}[/] {escape(said)}"
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
        "#", "PLAN", "GPUS", "LAYERS", "TOKENS/S", "ROOFLINE", "PER TOKEN", "FIRST TOKEN", "SEQUENCES", "DEVICES",
        right=("#", "GPUS", "TOKENS/S", "ROOFLINE", "PER TOKEN", "FIRST TOKEN", "SEQUENCES"),
    )  # fmt: skip
    for number, plan in enumerate(plans, 1):
        made.add_row(
            str(number),
            kind(plan) + (" [yellow]![/]" if plan.warnings else ""),
            str(len(plan.devices)),
            escape(layers(plan)),
            render.number(plan.expected and plan.expected.tokens_per_second, digits=1),
            render.number(plan.tokens_per_second, digits=1),
            milliseconds(plan.expected.token_seconds if plan.expected else plan.token_seconds),
            milliseconds(plan.expected.first_token_seconds if plan.expected else plan.first_token_seconds),
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
    if plan.expected is not None:
        yield f"expected: {expected_words(plan.expected)}"
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
