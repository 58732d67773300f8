"""Answers to the notice that an elastic lease may grow or shrink: `corral resize`, and `corral run --on-resize`."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape

from ...client import CorralError
from ...client.leases.lease import HeldLease
from ...schemas.requests import Lease, Resize, ResizeKind
from .. import render
from ..options import console, print_json, say
from ..options_struct import takes
from .checkpoint import AnswerOptions, answer_for

DEVICES_VARIABLE: Final = "CORRAL_DEVICES_FILE"
"""Environment variable with the path of the file that `corral run --on-resize` keeps up to date."""
_POLL_SECONDS: Final = 0.5
"""Interval of the checks of the lease: a notice may be over, or the command may have answered it."""


class Answer(StrEnum):
    """Answers to a notice."""

    ACCEPT = "accept"
    DECLINE = "decline"


class ResizeOptions(AnswerOptions, kw_only=True):
    """Options of `corral resize`."""

    answer: Annotated[Answer, typer.Argument(help="Agree, or keep the GPUs as they are.")]
    devices: Annotated[
        list[str] | None,
        typer.Argument(metavar="[UUID]...", help="GPUs to take or to give back. Default: those of the notice."),
    ] = None


@takes(ResizeOptions)
def resize(options: ResizeOptions) -> None:
    """Answer the notice that an elastic lease may have more GPUs or shall give some back.

    In a command of `corral run`, that of its lease. GPUs that are given back must not be in use any more. Exit code 5
    if there is no notice, it is over, or the lease has ended or isn't yours.

    Examples:
      corral resize accept
      corral resize decline --lease 01JD…
      corral resize accept GPU-5a3c… --lease 01JD…
    """
    accept = options.answer is Answer.ACCEPT
    after = answer_for(
        options,
        lambda client, one: client.resize(one.lease_id, accept=accept, devices=options.devices or (), owner=one.owner),
    )
    if options.json:
        print_json(after)
        return
    console().print(f"[green]{escape(after.lease_id)}[/] has {render.gpus_text(after)} GPUs")


def devices_after(lease: Lease) -> list[str]:
    """UUIDs of a lease's devices, without those that it is asked to give back."""
    asked = lease.resize if lease.resize is not None and lease.resize.kind is ResizeKind.REQUEST else None
    gone = {grant.device for grant in asked.grants} if asked is not None else frozenset[str]()
    return [grant.device for grant in lease.grants if grant.device and grant.device not in gone]


class Resizes:
    """The file with the devices of a command, kept up to date, and a signal to the command at each change.

    Offered devices are accepted. When some are asked back, the file lists the others: the command answers with `corral
    resize` once it no longer uses those asked back. Use it as a context manager, which removes the file at the end.

    Args:
        number: signal for the command.

    Attributes:
        send: sends a signal to the command; set it once that runs.
        path: the file: UUIDs in one line, with commas between them, as in `CUDA_VISIBLE_DEVICES`.
    """

    def __init__(self, number: signal.Signals) -> None:
        self.send: Callable[[int], None] = lambda _: None
        self._number = number
        self._folder = tempfile.TemporaryDirectory(prefix="corral-")
        self.path = Path(self._folder.name) / "devices"
        self._written: list[str] = []
        self._answered = 0
        self._noticed = asyncio.Event()

    def __enter__(self) -> Resizes:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def notice(self, _: Resize) -> None:
        """Note that the lease has a notice; the `on_resize` of the lease."""
        self._noticed.set()

    def write(self, lease: Lease) -> bool:
        """Write the devices of the lease into the file, if they have changed; returns whether they have."""
        devices = devices_after(lease)
        if devices == self._written:
            return False
        self._written = devices
        new = self.path.with_suffix(".new")
        new.write_text(",".join(devices) + "\n")
        os.replace(new, self.path)  # a reader sees the old list or the new one
        return True

    async def follow(self, held: HeldLease) -> None:
        """Answer offers, and keep the file up to date, until cancelled."""
        while True:
            await self._accept(held)
            notice = held.resize
            if self.write(held.lease):
                if notice is not None and notice.kind is ResizeKind.REQUEST:
                    say(f"corral: the lease is {render.resize_text(notice)}: `corral resize accept` agrees")
                else:
                    say(f"corral: the lease has {render.gpus_text(held.lease)} GPUs from now on")
                self.send(self._number)
            self._noticed.clear()
            try:
                async with asyncio.timeout(_POLL_SECONDS):
                    await self._noticed.wait()
            except TimeoutError:
                continue

    async def _accept(self, held: HeldLease) -> None:
        notice = held.resize
        if notice is None or notice.kind is not ResizeKind.OFFER or notice.number == self._answered:
            return
        self._answered = notice.number
        try:
            await held.answer_resize(True, (), notice.number)
        except CorralError as error:
            say(f"corral: the lease stays as it is: {error}")
