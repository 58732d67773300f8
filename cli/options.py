"""What commands share: options, the connection, and how results are printed."""

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

from ..bus.connect import URL_VARIABLE
from ..bus.credentials import CREDENTIALS_VARIABLE
from ..client import Client
from .everywhere import another_bus

if TYPE_CHECKING:
    from rich.console import Console

    from ..client import Client

T = TypeVar("T")


NatsUrl = Annotated[
    str | None,
    typer.Option(
        "--nats", metavar="URL", help="The bus. Default: $CORRAL_NATS_URL, then localhost.", callback=another_bus
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Owner = Annotated[
    str | None, typer.Option("--owner", metavar="NAME", help="Who asks. Default: $CORRAL_OWNER, then your account.")
]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Wait so long for an answer.")]

PIPE_WIDTH: Final = 100_000
"""A pipe has no width, whatever `COLUMNS` says of some terminal: nothing is cut or wrapped there."""


@functools.cache
def console(stderr: bool = False) -> Console:
    """Where commands print: coloured on a terminal; plain in a pipe, and as wide as what is printed."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False, soft_wrap=False)


def print_json(value: Any) -> None:
    """Messages as JSON: one document with every field, indented on a terminal."""
    raw = msgspec.json.encode(whole(value))
    typer.echo(msgspec.json.format(raw, indent=2 if sys.stdout.isatty() else -1).decode())


def whole(value: Any) -> Any:
    """A message with all of its fields, those at their defaults too, which the bus leaves out: scripts want each."""
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
    """A line for people, on stderr, so that stdout stays with the result."""
    print(text, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def connected(nats: str | None, *, owner: str | None = None, timeout: float = 10.0) -> AsyncGenerator[Client]:
    """A client for a command that asks once: it says soon when nobody is there."""
    from ..client import connect

    # The command's own line says it; the log would say it for each attempt.
    logging.getLogger("corral.bus").setLevel(logging.CRITICAL)
    if nats and nats != os.environ.get(URL_VARIABLE):
        from .config import SOURCES

        # The option of a command names another bus than the context: its credentials are not shown there.
        for variable in [name for name in SOURCES if name.startswith("CORRAL_NATS_")]:
            os.environ.pop(variable, None)
    credentials = os.environ.get(CREDENTIALS_VARIABLE)
    async with connect(
        nats, owner=owner, credentials=credentials, timeout=timeout, patience=1.0, wait=0.3, name="corral-cli"
    ) as client:
        yield client


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work to its end."""
    return asyncio.run(work)


CANCEL_AGAIN_SECONDS: Final = 8.0
"""Below what a supervisor waits before it kills, above what a part needs to end in order."""


def cancel_surely(task: asyncio.Task[Any]) -> None:
    """Cancel a task, and again as long as it goes on: an await that fails at the very moment may swallow the first."""
    if not task.done():
        task.cancel()
        task.get_loop().call_later(CANCEL_AGAIN_SECONDS, cancel_surely, task)


Hosts = Annotated[list[str] | None, typer.Option("--host", metavar="GLOB", help="Only on such hosts. Repeatable.")]
Models = Annotated[list[str] | None, typer.Option("--model", metavar="GLOB", help="Only such models. Repeatable.")]
