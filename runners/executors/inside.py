"""Commands that are started inside a run that is confined already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from . import containers

_SHELL: Final = ("/bin/sh", "-c", "if command -v bash >/dev/null; then exec bash; else exec sh; fi")
"""The shell of an image; the account's may not be in it."""


def inside(executor: str, key: str, words: Sequence[str], terminal_type: str | None) -> list[str]:
    """Words of a command that the supervisor of a run starts, so that it is confined as the run is.

    Args:
        executor: of the run. The supervisor of a systemd unit is in the unit itself, and so is what it starts.
        key: name of the run.
        words: the command; empty for a shell.
        terminal_type: value of `TERM`; None without a terminal.

    Returns:
        The words; empty for the shell of the account.
    """
    if executor not in containers.PROGRAMS:
        return list(words)
    options = ["--interactive"]
    if terminal_type is not None:
        options += ["--tty", f"--env=TERM={terminal_type or 'dumb'}"]
    return [executor, "exec", *options, containers.names(key, 1)[0], *(words or _SHELL)]
