"""Addresses that services listen on, as options have them."""

from __future__ import annotations

from typing import Annotated

import typer

from ..exits import USAGE, CommandError

TrustedProxy = Annotated[
    list[str] | None,
    typer.Option(
        "--trusted-proxy",
        metavar="CIDR",
        help="Address or network of a proxy whose X-Forwarded-For is trusted. Repeatable.",
    ),
]


def host_and_port(listen: str, example: str) -> tuple[str, int]:
    """Parse the `HOST:PORT` of `--listen`; the host is without brackets, and empty for every address.

    Args:
        listen: the text.
        example: a right one, for the message.

    Raises:
        CommandError: it is of another form.
    """
    host, colon, port = listen.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise CommandError(f"--listen wants HOST:PORT, such as {example}, not {listen!r}", USAGE)
    return host.strip("[]"), int(port)
