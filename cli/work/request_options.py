"""Options that describe a work request, shared by `request`, `explain`, `run` and `shell`."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, Final, get_type_hints

import typer

from ...client import InvalidRequest
from ...client.request import RequestFields, parse_gpus
from ...schemas.requests import GpuRange
from ..exits import USAGE, CommandError
from ..options import Owner, model_globs

_DEVICES = "Devices"
_WHERE = "Hosts"
_HOW = "Lease and queue"
_ITEMS = "Work items"
_PREEMPTION = "Preemption"
_PROFILE: Final = re.compile(r"[0-9*?\]]g")


def _gpus(text: str | int) -> int | GpuRange:
    """Parse a number of GPUs, or a range, for Typer."""
    try:
        return parse_gpus(str(text))
    except InvalidRequest as error:
        raise typer.BadParameter(str(error)) from None


def _options(
    gpus: Annotated[
        GpuRange,
        typer.Option(
            "--gpus",
            "-g",
            metavar="N|MIN-MAX",
            parser=_gpus,
            help="Number of GPUs, or fewest and most of an elastic lease: 2-8.",
            rich_help_panel=_DEVICES,
        ),
    ] = 1,  # pyright: ignore[reportArgumentType]
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", "-m", metavar="SIZE", help="Memory on each GPU: 20GiB, 512MiB.", rich_help_panel=_DEVICES
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option("--share", help="Share of one GPU, such as 0.5.", rich_help_panel=_DEVICES),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option("--cpus", help="Total number of logical CPU cores.", rich_help_panel=_DEVICES)
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option("--host-memory", metavar="SIZE", help="Total RAM on the hosts.", rich_help_panel=_DEVICES),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="GPU model, a part of its name such as H100, or a glob. Repeatable.",
            rich_help_panel=_DEVICES,
            callback=model_globs,
        ),
    ] = None,
    vendor: Annotated[
        list[str] | None,
        typer.Option("--vendor", help="nvidia or amd. Repeatable.", rich_help_panel=_DEVICES),
    ] = None,
    min_compute_capability: Annotated[
        str | None,
        typer.Option(
            "--min-compute-capability",
            metavar="X.Y",
            help="Minimum CUDA compute capability, such as 8.0.",
            rich_help_panel=_DEVICES,
        ),
    ] = None,
    mig: Annotated[
        str | None,
        typer.Option(
            "--mig",
            metavar="GLOB",
            help="A MIG instance, of any profile or of one such as 1g.10gb or '*g.20gb'.",
            rich_help_panel=_DEVICES,
        ),
    ] = None,
    allow_in_use: Annotated[
        bool,
        typer.Option("--allow-in-use", help="Allow GPUs that are in use without a lease.", rich_help_panel=_DEVICES),
    ] = False,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="GLOB", help="Host. Repeatable.", rich_help_panel=_WHERE),
    ] = None,
    host_label: Annotated[
        list[str] | None,
        typer.Option("--host-label", metavar="K=V", help="Hosts with this label. Repeatable.", rich_help_panel=_WHERE),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option("--placement", help="same_host, fewest_hosts or spread.", rich_help_panel=_WHERE),
    ] = None,
    gpus_per_host: Annotated[
        int | None,
        typer.Option(
            "--gpus-per-host",
            metavar="N",
            min=1,
            help="N on each of several hosts; --gpus is the number on all.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    within: Annotated[
        str | None,
        typer.Option(
            "--within",
            metavar="LABEL",
            help="Several hosts, all with the same value of this label: rack, nvlink_domain.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    prefer_within: Annotated[
        str | None,
        typer.Option(
            "--prefer-within",
            metavar="LABEL",
            help="The same where it fits now, else any hosts.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Ranking policy. Default: the planner's.", rich_help_panel=_WHERE)
    ] = None,
    ttl: Annotated[
        str | None,
        typer.Option(
            "--ttl",
            metavar="TIME",
            help="Time to live: the lease ends after it unless renewed. 5m, 1h.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    wait: Annotated[
        str | None,
        typer.Option(
            "--wait",
            "-w",
            metavar="TIME",
            help="Maximum time in the queue: 10m. Default: don't wait.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option("--expect", metavar="TIME", help="Estimated duration of the work: 2h.", rich_help_panel=_HOW),
    ] = None,
    max: Annotated[
        str | None,
        typer.Option(
            "--max", metavar="TIME", help="Time limit: the lease ends then, even if renewed.", rich_help_panel=_HOW
        ),
    ] = None,
    priority: Annotated[
        int | None,
        typer.Option("--priority", help="Priority in the queue; the highest goes first.", rich_help_panel=_HOW),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the workload, kept in the history.", rich_help_panel=_HOW)
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="K=V", help="Label of the lease. Repeatable.", rich_help_panel=_HOW),
    ] = None,
    request_id: Annotated[
        str | None,
        typer.Option("--request-id", help="Idempotency key: the same id gets the same answer.", rich_help_panel=_HOW),
    ] = None,
    preemptible: Annotated[
        bool,
        typer.Option("--preemptible", help="The lease may be preempted, with a notice.", rich_help_panel=_PREEMPTION),
    ] = False,
    grace: Annotated[
        str | None,
        typer.Option(
            "--grace",
            metavar="TIME",
            help="Time between the notice of a preemption and the end. Default: 30s.",
            rich_help_panel=_PREEMPTION,
        ),
    ] = None,
    checkpoint: Annotated[
        bool,
        typer.Option("--checkpoint", help="The work is saved when the notice comes.", rich_help_panel=_PREEMPTION),
    ] = False,
    min_run: Annotated[
        str | None,
        typer.Option(
            "--min-run",
            metavar="TIME",
            help="The lease is not preempted before it has lasted so long: 10m.",
            rich_help_panel=_PREEMPTION,
        ),
    ] = None,
    requeue_of: Annotated[
        str | None,
        typer.Option(
            "--requeue-of",
            metavar="LEASE",
            help="Your preempted lease whose work goes on: keep its place in the queue.",
            rich_help_panel=_PREEMPTION,
        ),
    ] = None,
    owner: Owner = None,
    items: Annotated[
        int | None,
        typer.Option("--items", help="Number of work items to distribute over the GPUs.", rich_help_panel=_ITEMS),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="Distribution: uniform, capacity, balanced or pipeline.", rich_help_panel=_ITEMS),
    ] = None,
    weight_by: Annotated[
        str | None,
        typer.Option(
            "--weight-by",
            help="What the distribution is weighted by: compute, memory or bandwidth.",
            rich_help_panel=_ITEMS,
        ),
    ] = None,
    memory_per_item: Annotated[
        str | None,
        typer.Option("--memory-per-item", metavar="SIZE", help="Memory of each item.", rich_help_panel=_ITEMS),
    ] = None,
    max_items_per_device: Annotated[
        int | None,
        typer.Option(
            "--max-items-per-device", metavar="N", help="Maximum number of items on one GPU.", rich_help_panel=_ITEMS
        ),
    ] = None,
) -> None: ...


_HINTS = get_type_hints(_options, include_extras=True)
_PARAMETERS = [
    parameter.replace(annotation=_HINTS[name], kind=inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in inspect.signature(_options).parameters.items()
]
_LISTS = {"model": "models", "vendor": "vendors", "host": "hosts"}


def with_request_options(function: Callable[..., Any], without: Collection[str] = frozenset()) -> Callable[..., Any]:
    """Decorate a command with the options of a request; it is called with them as `fields`, a `RequestFields`.

    An option that the command has itself is left out of `fields`.

    Args:
        function: the command.
        without: names of parameters whose options the command does not have.
    """
    own = get_type_hints(function, include_extras=True)
    parameters = [
        parameter.replace(annotation=own[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "fields"
    ]
    shared = [parameter for parameter in _PARAMETERS if parameter.name not in own and parameter.name not in without]
    names = [parameter.name for parameter in shared]

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        given = {name: values.pop(name) for name in names}
        return function(fields=request_fields(given), **values)

    arguments = [p for p in parameters if p.name in ("command", "shell")]
    options = [p for p in parameters if p.name not in ("command", "shell")]
    command.__signature__ = inspect.Signature([*arguments, *shared, *options])  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {p.name: p.annotation for p in (*parameters, *shared)}
    return command


def request_fields(given: dict[str, Any]) -> RequestFields:
    """Convert the values of the options to keyword arguments of the client; options that weren't given are left out."""
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or value == [] or value is False:
            continue
        if name == "mig":
            fields[name] = _profile(value)
            continue
        if name in ("label", "host_label"):
            fields[f"{name}s"] = pairs(value, f"--{name.replace('_', '-')}")
        else:
            fields[_LISTS.get(name, name)] = value
    return fields  # pyright: ignore[reportReturnType]


def _profile(text: str) -> bool | str:
    if text in ("any", "*", "true"):
        return True
    if _PROFILE.search(text) is None:
        raise CommandError(
            f"--mig {text!r} is no profile; use one such as 1g.10gb or '*g.20gb', or --mig=any before a command",
            USAGE,
        )
    return text


def pairs(values: list[str], option: str) -> dict[str, str]:
    """Parse `K=V` texts to a dictionary; an invalid text is an error about `option`."""
    found: dict[str, str] = {}
    for value in values:
        key, sign, text = value.partition("=")
        if not sign or not key:
            raise CommandError(f"{option} {value!r}: expected KEY=VALUE, such as rack=r1", USAGE)
        found[key] = text
    return found
