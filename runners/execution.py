"""The start of a command of a run, by its supervisor: account, directory, environment and files.

It uses only the standard library, since `supervisor.py` loads it by its path.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import termios
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING or __package__:
    from ..bus import processes
else:
    processes = sys.modules["corral_processes"]

Files = tuple[int | None, int, int]
"""Descriptors of standard input, output and error of a command; None for an empty input."""
_VARIABLES: Final = 100
VARIABLES_FILE: Final = f"/proc/self/fd/{_VARIABLES}"
"""File with the variables of a command that are not in its environment, a line each."""


def start(
    command: dict[str, Any], start: dict[str, Any], files: Files, *, terminal: bool = False
) -> tuple[int, dict[str, Any] | None]:
    """Start a command in a session of its own.

    Args:
        command: its words, its environment, and its variables for `VARIABLES_FILE`.
        start: the run's account and directory; see `runners/start.py`.
        files: its standard files.
        terminal: its standard input is the terminal that controls it.

    Returns:
        Its process id; and why it could not be executed, None if it was: the exit code that a shell would have, a
        message for its owner, and one without its words and paths, which everyone may see.
    """
    receive, give = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _execute(command, start, give, parent, files, terminal=terminal)
    os.close(give)
    failed = b""
    while piece := os.read(receive, 4096):
        failed += piece
    os.close(receive)
    if failed:
        os.waitpid(pid, 0)
        return pid, json.loads(failed)
    return pid, None


def _execute(
    command: dict[str, Any], start: dict[str, Any], give: int, parent: int, files: Files, *, terminal: bool
) -> None:
    """Execute a command in the child process; never returns."""
    try:
        os.setsid()
        given, output, errors = files
        given = os.open(os.devnull, os.O_RDWR) if given is None else given
        for number, file in ((0, given), (1, output), (2, errors)):
            os.dup2(file, number)
        if terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        account = start["account"]
        if account is not None:
            if terminal:
                os.fchown(0, account["uid"], -1)
            os.setgroups(account["groups"])
            os.setgid(account["gid"])
            os.setuid(account["uid"])
        # Changing the account has cleared it; if the supervisor is killed, the kernel ends the command.
        if not processes.end_with_parent(parent):
            os._exit(1)
        os.umask(0o022)
        os.environ.clear()
        os.environ.update(command["environment"])
        if command.get("variables"):
            _offer(command["variables"])
        processes.restore_signals()
        try:
            os.chdir(start["directory"])
        except OSError as error:
            _fail(give, 126, start["directory"], "its working directory", (error.strerror or "").lower())
            return
        error = processes.execute(command["words"])
        code = 127 if isinstance(error, FileNotFoundError) else 126
        _fail(give, code, command["words"][0], "its command", (error.strerror or "can't be executed").lower())
    finally:
        os._exit(127)


def _fail(give: int, code: int, what: str, called: str, why: str) -> None:
    failed = {"code": code, "message": f"{what}: {why}", "public": f"{called}: {why}"}
    os.write(give, json.dumps(failed).encode())


def _offer(variables: dict[str, str]) -> None:
    """Write variables to a file in memory, which the command inherits."""
    with os.fdopen(os.memfd_create("variables"), "w", encoding="utf-8") as file:
        file.writelines(f"{key}={value}\n" for key, value in variables.items())
        file.flush()
        os.dup2(file.fileno(), _VARIABLES)
