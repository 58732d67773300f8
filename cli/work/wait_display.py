"""Display of a request's place in the queue while it waits."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from ...schemas import operations
from ..options import console, say
from ..render import duration, starts


@contextlib.contextmanager
def wait_display(quiet: bool = False) -> Generator[Any]:
    """Yield an `on_wait` callback that shows the place in the queue; None if `quiet`.

    On a terminal it updates a live line; otherwise it prints a line each time that something changes.
    """
    err = console(stderr=True)
    if quiet:
        yield None
        return
    if err.is_terminal:
        with err.status("Requesting…") as status:

            def update(entry: operations.QueueEntry) -> None:
                status.update(_text(entry))

            yield update
        return
    shown: list[tuple[int, str]] = []

    def tell(entry: operations.QueueEntry) -> None:
        if shown[-1:] != [(entry.position, entry.message)]:
            shown[:] = [(entry.position, entry.message)]
            say(f"corral: {_text(entry)}")

    yield tell


def _text(entry: operations.QueueEntry) -> str:
    expected = "" if starts(entry) == "–" else f", expected to start in {starts(entry)}"
    waited = duration(entry.waiting_seconds)
    return f"position {entry.position} in the queue for {waited}{expected}: {entry.message}"
