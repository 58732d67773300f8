"""Runs a service until it is stopped, with an orderly shutdown within a timeout."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from typing import Annotated, Any, Final

import typer

from ...bus.tasks import cancel_until_done
from ...schemas.values.units import parse_seconds
from ..exits import FAILED, USAGE, CommandError
from .logs import PANEL

log = logging.getLogger("corral.service")

StopWithin = Annotated[
    str,
    typer.Option(
        "--stop-within",
        envvar="CORRAL_STOP_WITHIN",
        metavar="TIME",
        help="Timeout of a graceful shutdown after SIGTERM.",
        rich_help_panel=PANEL,
    ),
]
STOP_WITHIN: Final = "10s"


def stop_seconds(text: str) -> float:
    """Parse the time of `--stop-within`, in seconds.

    Raises:
        CommandError: it isn't a valid time.
    """
    try:
        seconds = parse_seconds(text)
    except ValueError as error:
        raise CommandError(f"--stop-within: {error}", USAGE) from error
    if not 0 < seconds <= 3600:
        raise CommandError("--stop-within wants a time above 0 and of an hour at most, such as 10s", USAGE)
    return seconds


def run_service(work: Coroutine[Any, Any, None], within_seconds: float, stop: asyncio.Event | None = None) -> None:
    """Run a service until it ends, or until SIGINT or SIGTERM.

    The first signal starts an orderly shutdown, with exit code 0. If it takes longer than `within_seconds`, the process
    exits with code 1; all that was acknowledged is durable, as after a crash. A second signal ends the process at once.

    Args:
        work: the service.
        within_seconds: timeout of the shutdown.
        stop: event that is set to stop the service; without it, the work is cancelled.

    Raises:
        Exception: the error that ended the work.
    """
    try:
        from uvloop import run
    except ImportError:  # only the extras of services bring it
        from asyncio import run
    run(_until_stopped(work, within_seconds, stop))


async def _until_stopped(work: Coroutine[Any, Any, None], within_seconds: float, stop: asyncio.Event | None) -> None:
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()
    stopped = False

    def begin(number: int) -> None:
        nonlocal stopped
        stopped = True
        log.info("%s: shutting down, within %g s", signal.Signals(number).name, within_seconds)
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(each)
            # The system's default action ends the process even if its event loop hangs.
            signal.signal(each, signal.SIG_DFL)
        # In a thread, since it may be the event loop that hangs.
        timer = threading.Timer(within_seconds, _give_up, [within_seconds])
        timer.daemon = True
        timer.start()
        if stop is None:
            cancel_until_done(task)
        else:
            stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, begin, number)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    if not stopped and task.cancelled():
        raise asyncio.CancelledError
    if stopped:
        log.info("shut down")


def _give_up(seconds: float) -> None:
    log.error("no graceful shutdown within %g s: exiting now. All acknowledged data is durable", seconds)
    sys.stderr.flush()
    os._exit(FAILED)
