"""Answer to whether devices can serve a model: verdict, sizes, plans to choose from, commands of servers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from nicegui import ui

from ...client.server_commands import SERVERS, offer
from ...client.server_commands.command import Offer
from ...client.serving_text import devices, expected_words, kind, layers, milliseconds, model_line
from ...schemas.models.serving import FitVerdict, ServeFit, ServePlan, ServeWork
from ...schemas.values.units import format_bytes
from ..html import tag
from .copy_button import CopyButton

_TITLES: Final = {
    FitVerdict.ONE_DEVICE: "Fits on one GPU",
    FitVerdict.SEVERAL_DEVICES: "Fits on several GPUs",
    FitVerdict.NO: "Does not fit",
}
MAX_COMMANDS: Final = 16
"""Most commands of a server that are shown."""
_HEADS: Final = (
    "#",
    "Plan",
    "GPUs",
    "Layers",
    "Tokens/s",
    "Roofline",
    "Per token",
    "First token",
    "Sequences",
    "Devices",
)
_NUMERIC: Final = (2, 4, 5, 6, 7, 8)


def verdict(work: ServeWork, fit: ServeFit, problem: str = "") -> None:
    """Show whether the model fits, why, and what would have to change; `problem` is why rates are not measured ones."""
    fits = fit.verdict is not FitVerdict.NO
    with tag("div", f"verdict {'good' if fits else 'bad'}", role="status"):
        ui.icon("check_circle" if fits else "do_not_disturb_on")
        tag("span", text=_TITLES[fit.verdict])
    tag("div", "fit-why", fit.message[:1].upper() + fit.message[1:])
    if fit.nearest:
        tag("div", "fit-why", f"Nearest: {fit.nearest}")
    tag("div", "note", model_line(work.model))
    for note in work.model.assumed:
        tag("div", "note fit-warning", f"Assumed: {note}")
    if problem:
        tag("div", "note fit-warning", problem[:1].upper() + problem[1:])
    with tag("div", "facts fit-facts"):
        for name, value in _facts(work, fit):
            with tag("div"):
                tag("div", "fact-name", name)
                tag("div", "fact-value", value)


def _facts(work: ServeWork, fit: ServeFit) -> Iterable[tuple[str, str]]:
    yield "Weights", format_bytes(fit.weights_bytes)
    yield "KV cache of a token", f"{fit.kv_token_bytes / 1024:.1f} KiB"
    yield f"KV cache of {work.sequences:,} × {work.context_tokens:,} tokens", format_bytes(fit.kv_bytes)
    yield "Intermediate results on each GPU", f"about {format_bytes(fit.working_bytes)}"
    yield "Devices considered", f"{fit.devices:,}, with {format_bytes(fit.usable_bytes)} to use"
    if fit.short_bytes:
        yield "Memory that is missing", format_bytes(fit.short_bytes)
    if fit.plans and fit.bound_tokens_per_second is not None:
        yield "No placement exceeds", f"{fit.bound_tokens_per_second:,.0f} tokens/s"


def plans(found: Sequence[ServePlan], chosen: int, choose: Callable[[int], Any]) -> None:
    """Show a table of plans, one of which is chosen; `choose` is called with the number of another, from 1."""
    with tag("div", "table-wrap"), tag("table", "rows fit-plans"):
        with tag("thead"), tag("tr"):
            for at, head in enumerate(_HEADS):
                tag("th", "num" if at in _NUMERIC else "", head)
        with tag("tbody"):
            for number, plan in enumerate(found, 1):
                with tag("tr", "here" if number == chosen else "") as row:
                    with tag("td"):
                        tag("button", "btn small", str(number), type="button", aria_label=f"Plan {number}",
                            aria_pressed="true" if number == chosen else "false")  # fmt: skip
                    for at, text in enumerate(_cells(plan), 1):
                        tag("td", "num" if at in _NUMERIC else "wrap" if at == len(_HEADS) - 1 else "", text)
                row.on("click", lambda number=number: choose(number), [])


def _cells(plan: ServePlan) -> tuple[str, ...]:
    served = plan.expected
    return (
        kind(plan) + (" !" if plan.warnings else ""),
        str(len(plan.devices)),
        layers(plan),
        _rate(None if served is None else served.tokens_per_second),
        _rate(plan.tokens_per_second),
        milliseconds(plan.token_seconds if served is None else served.token_seconds),
        milliseconds(plan.first_token_seconds if served is None else served.first_token_seconds),
        f"{plan.sequences:,}",
        devices(plan),
    )


def _rate(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def rests_on(plan: ServePlan) -> None:
    """Show the limits that a plan breaks, and what its figures rest on."""
    for warning in plan.warnings:
        tag("div", "note fit-warning", warning)
    if plan.expected is not None:
        tag("div", "note", f"Expected: {expected_words(plan.expected)}.")
    if plan.rests_on:
        tag("div", "note", f"Its figures rest on {'; '.join(plan.rests_on)}.")


def commands(plan: ServePlan, work: ServeWork, path: str) -> None:
    """Show the commands of each server to copy, or the reason why it can't express the plan."""
    for name in SERVERS:
        _offer(offer(name, plan, work, path))


def _offer(one: Offer) -> None:
    with tag("section", "fit-server"):
        with tag("div", "bar"):
            tag("b", text=one.server)
            if one.refusal:
                tag("span", "chip", "not offered")
            else:
                tag("span", "note", f"as of {one.version}")
                lines = "\n".join(f"# on {command.host}\n{command.line}" for command in one.commands)
                CopyButton(lines).classes("fit-copy-button")
        if one.refusal:
            tag("div", "note", one.refusal)
        for command in one.commands[:MAX_COMMANDS]:
            tag("div", "note", f"on {command.host}")
            tag("pre", "text fit-command", command.line)
        if len(one.commands) > MAX_COMMANDS:
            tag("div", "note", f"and {len(one.commands) - MAX_COMMANDS} more, which are copied, too")
        for note in one.notes:
            tag("div", "note", note)
