"""Options that describe a model to serve, shared by `fit` and `serve`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, get_type_hints

import typer

from ....client.model_files import read_model
from ....client.model_files.plain_numbers import described, parameters
from ....client.request import RequestFields
from ....client.serving import ServeFields, serve_work
from ....schemas import operations
from ....schemas.models.serving import ServeWork
from ....schemas.values import units
from ...exits import USAGE, CommandError

_MODEL = "Model"
_LOAD = "Load"
_DEVICES = "Devices"


class Asked(NamedTuple):
    """Question that the options ask.

    Attributes:
        path: path or name of the model; empty if it is described by numbers.
        work: what is to be served.
        fields: limits on the devices.
        more: devices to assume in addition.
    """

    path: str
    work: ServeWork
    fields: RequestFields
    more: list[operations.Addition]


class Asking:
    """Values of the options, from which a question is built when it is called."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given

    def __call__(self) -> Asked:
        """Build the question, and read the model for it."""
        return asked_for(self._given)

    @property
    def names_model(self) -> bool:
        """True if a model is given, by a file or by numbers."""
        return self._given["model"] is not None or self._given["params"] is not None


def _options(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Folder with config.json, safetensors or GGUF files, or one of these files."
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option("--params", metavar="N", help="Parameters, without a file: 70B.", rich_help_panel=_MODEL),
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Layers, with --params.", rich_help_panel=_MODEL)
    ] = None,
    hidden: Annotated[
        int | None, typer.Option("--hidden", min=1, help="Hidden size, with --params.", rich_help_panel=_MODEL)
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", min=1, help="Attention heads, with --params.", rich_help_panel=_MODEL)
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option("--kv-heads", min=1, help="Heads of keys and values, with --params.", rich_help_panel=_MODEL),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(
            "--head-dim",
            min=1,
            help="Numbers in a head, with --params.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="FORMAT", help="Weights as bf16, fp8, int4, q4_k, … instead.", rich_help_panel=_MODEL
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option("--kv-dtype", metavar="FORMAT", help="KV cache as bf16 or fp8.", rich_help_panel=_MODEL),
    ] = None,
    context: Annotated[
        int, typer.Option("--context", min=1, help="Longest sequence in tokens.", rich_help_panel=_LOAD)
    ] = 4096,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences at once.", rich_help_panel=_LOAD)] = 1,
    prompt: Annotated[
        int | None,
        typer.Option("--prompt", min=1, help="Tokens of a prompt. Default: half of --context.", rich_help_panel=_LOAD),
    ] = None,
    max_token_time: Annotated[
        str | None,
        typer.Option("--max-token-time", metavar="TIME", help="Longest time per token: 50ms.", rich_help_panel=_LOAD),
    ] = None,
    max_first_token_time: Annotated[
        str | None,
        typer.Option(
            "--max-first-token-time", metavar="TIME", help="Longest time to the first token: 2s.", rich_help_panel=_LOAD
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", help="Measured rates, as TOML or JSON.", rich_help_panel=_DEVICES),
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(
            "--network", metavar="GBIT", min=0.001, help="Gbit/s between hosts. Default: 10.", rich_help_panel=_DEVICES
        ),
    ] = None,
    memory_share: Annotated[
        float,
        typer.Option(
            "--memory-share", min=0.1, max=1.0, help="Part of the free memory to use.", rich_help_panel=_DEVICES
        ),
    ] = 0.9,
    tensor_parallel: Annotated[
        bool,
        typer.Option(
            "--tensor-parallel/--no-tensor-parallel",
            help="Let like GPUs of a host work as one.",
            rich_help_panel=_DEVICES,
        ),
    ] = True,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="GLOB", help="GPU model: '*H100*'. Repeatable.", rich_help_panel=_DEVICES),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="GLOB", help="Host. Repeatable.", rich_help_panel=_DEVICES),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--with-more", metavar="N×MODEL", help="Assume additional devices: 8xH100.", rich_help_panel=_DEVICES
        ),
    ] = None,
) -> None: ...


_HINTS: Final = get_type_hints(_options, include_extras=True)
_PARAMETERS: Final = [
    parameter.replace(annotation=_HINTS[name], kind=inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in inspect.signature(_options).parameters.items()
]


def with_model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with these options; it is called with them as `asked`."""
    own = get_type_hints(function, include_extras=True)
    parameters = [
        parameter.replace(annotation=own[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "asked"
    ]
    names = [parameter.name for parameter in _PARAMETERS]

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        given = {name: values.pop(name) for name in names}
        return function(asked=Asking(given), **values)

    shared = _PARAMETERS
    command.__signature__ = inspect.Signature([*shared, *parameters])  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {p.name: p.annotation for p in (*parameters, *shared)}
    return command


def asked_for(given: dict[str, Any]) -> Asked:
    """Read the model, and build the question.

    Raises:
        InvalidRequest: the model or a number is invalid.
        CommandError: options contradict each other.
    """
    path: str | None = given["model"]
    if (path is None) == (given["params"] is None):
        raise CommandError("give a model's folder or file, or --params 70B --layers 80", USAGE)
    serve: ServeFields = {
        "context": given["context"],
        "sequences": given["sequences"],
        "memory_share": given["memory_share"],
        "tensor_parallel": given["tensor_parallel"],
    }
    if path is not None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim"):
            if given[name] is not None:
                raise CommandError(f"--{name.replace('_', '-')} goes with --params: the files say it", USAGE)
        model = read_model(path)
        if given["dtype"]:
            serve["dtype"] = given["dtype"]
    else:
        if given["layers"] is None:
            raise CommandError("--params goes with --layers", USAGE)
        model = described(
            parameters(given["params"]),
            given["layers"],
            hidden=given["hidden"],
            heads=given["heads"],
            kv_heads=given["kv_heads"],
            head_dim=given["head_dim"],
            dtype=given["dtype"] or "bf16",
        )
    for name in ("prompt", "kv_dtype", "profile"):
        if given[name] is not None:
            serve[name] = given[name]
    for name, field in (("max_token_time", "max_token_seconds"), ("max_first_token_time", "max_first_token_seconds")):
        if given[name] is not None:
            serve[field] = _seconds(given[name], name)
    if given["network"] is not None:
        serve["network_bytes_per_second"] = given["network"] * 1e9 / 8
    fields: RequestFields = {}
    if given["gpu"]:
        fields["models"] = given["gpu"]
    if given["host"]:
        fields["hosts"] = given["host"]
    return Asked(path or "", serve_work(model, serve), fields, [addition(text) for text in given["more"] or []])


def _seconds(text: str, name: str) -> float:
    number = text.strip()
    try:
        return float(number[:-2]) / 1000 if number.endswith("ms") else units.parse_seconds(number)
    except ValueError as error:
        raise CommandError(f"--{name.replace('_', '-')} {text!r}: {error}", USAGE) from None


def addition(text: str) -> operations.Addition:
    """Parse devices to assume in addition: `8xH100`.

    Raises:
        CommandError: it has another form.
    """
    count, sign, model = text.replace("×", "x").partition("x")
    if not sign or not count.strip().isdigit() or not model.strip():
        raise CommandError(f"--with-more {text!r}: expected a form such as 8xH100", USAGE)
    return operations.Addition(model=model.strip(), devices=int(count))
