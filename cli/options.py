"""Shared code of the commands: common options, the connection, and output."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import sys
from collections.abc import AsyncGenerator, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar, cast

import msgspec
import typer

from ..bus.credentials import CREDENTIALS_VARIABLE
from ..client import Client
from ..schemas.values.globs import containing
from .global_options import use_url

if TYPE_CHECKING:
    from rich.console import Console

    from ..client import Client

T = TypeVar("T")


NatsUrl = Annotated[
    str | None,
    typer.Option(
        "--nats",
        metavar="URL",
        help="URL of the NATS server. Default: $CORRAL_NATS_URL, then localhost.",
        callback=use_url,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Owner = Annotated[
    str | None,
    typer.Option(
        "--owner", metavar="NAME", help="Owner of the request or lease. Default: $CORRAL_OWNER, then your user name."
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Timeout for the answer.")]

PIPE_WIDTH: Final = 100_000
"""Console width for a pipe, whatever `COLUMNS` says, so that nothing is truncated or wrapped."""


@functools.cache
def console(stderr: bool = False) -> Console:
    """Console for output: with colors on a terminal; without colors and without a width limit in a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False, soft_wrap=False)


def print_json(value: Any) -> None:
    """Print messages as one JSON document with every field, indented on a terminal."""
    raw = msgspec.json.encode(whole(value))
    typer.echo(msgspec.json.format(raw, indent=2 if sys.stdout.isatty() else -1).decode())


def whole(value: Any) -> Any:
    """Convert a message to a dictionary with all fields, including defaults, which are omitted on the bus."""
    if isinstance(value, msgspec.Struct):
        config = value.__struct_config__
        tagged = {config.tag_field: config.tag} if config.tag_field else {}
        return tagged | {name: whole(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [whole(entry) for entry in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in cast("dict[Any, Any]", value).items()}
    return value


def say(text: str) -> None:
    """Print a message on stderr, so that stdout holds only the result."""
    print(text, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def connected(nats: str | None, *, owner: str | None = None, timeout: float = 10.0) -> AsyncGenerator[Client]:
    """A client for a short command, with short waits so that a missing bus or service is reported soon."""
    from ..client import connect

    # The command reports the error once; the log would repeat it for each attempt.
    logging.getLogger("corral.bus").setLevel(logging.CRITICAL)
    use_url(nats)
    credentials = os.environ.get(CREDENTIALS_VARIABLE)
    async with connect(
        nats, owner=owner, credentials=credentials, timeout=timeout, patience=1.0, wait=0.3, name="corral-cli"
    ) as client:
        yield client


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work to its end."""
    return asyncio.run(work)


Hosts = Annotated[list[str] | None, typer.Option("--host", metavar="GLOB", help="Hosts that match. Repeatable.")]


def model_globs(models: list[str] | None) -> list[str] | None:
    """Patterns for names of GPU models: a text without wildcards finds the models that contain it."""
    return models and [containing(text) for text in models]


Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="NAME", help="GPU model, a part of its name, or a glob. Repeatable.", callback=model_globs
    ),
]
