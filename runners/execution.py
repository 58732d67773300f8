"""The start of a command of a run, by its supervisor: account, directory, environment and files.

It uses only the standard library, since `supervisor.py` loads it by its path.
"""

from __future__ import annotations

import contextlib
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
_UMASK: Final = 0o022
_VARIABLES: Final = 100
VARIABLES_FILE: Final = f"/proc/self/fd/{_VARIABLES}"
"""File with the variables of a command that are not in its environment, a line each."""


def start(
    command: dict[str, Any], start: dict[str, Any], files: Files, *, terminal: bool = False, spawned: bool = False
) -> tuple[int, dict[str, Any] | None]:
    """Start a command in a session of its own.

    The kernel ends it when this process is killed, unless it was spawned.

    Args:
        command: its words, its environment, and its variables for `VARIABLES_FILE`.
        start: the run's account and directory; see `runners/start.py`.
        files: its standard files.
        terminal: its standard input is the terminal that controls it.
        spawned: start it without a copy of this process, where it needs no other account and no file of variables:
            that takes half the time. This process itself goes to the directory then, and has the command's umask.

    Returns:
        Its process id; and why it could not be executed, None if it was: the exit code that a shell would have, a
        message for its owner, and one without its words and paths, which everyone may see.
    """
    if spawned and start["account"] is None and not command.get("variables"):
        with contextlib.suppress(NotImplementedError):
            return _spawn(command, start["directory"], files)
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


def _spawn(command: dict[str, Any], directory: str, files: Files) -> tuple[int, dict[str, Any] | None]:
    try:
        os.chdir(directory)
    except OSError as error:
        return 0, _no_directory(directory, error)
    os.umask(_UMASK)
    try:
        found = processes.spawn(command["words"], command["environment"], files)
    except ValueError as error:
        return 0, _failure(126, repr(command["words"][0]), "its command", str(error))
    return (0, _not_executed(command, found)) if isinstance(found, OSError) else (found, None)


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
        os.umask(_UMASK)
        os.environ.clear()
        os.environ.update(command["environment"])
        if command.get("variables"):
            _offer(command["variables"])
        processes.restore_signals()
        try:
            os.chdir(start["directory"])
        except OSError as error:
            os.write(give, json.dumps(_no_directory(start["directory"], error)).encode())
            return
        os.write(give, json.dumps(_not_executed(command, processes.execute(command["words"]))).encode())
    finally:
        os._exit(127)


def _no_directory(directory: str, error: OSError) -> dict[str, Any]:
    return _failure(126, directory, "its working directory", (error.strerror or "").lower())


def _not_executed(command: dict[str, Any], error: OSError) -> dict[str, Any]:
    code = 127 if isinstance(error, FileNotFoundError) else 126
    return _failure(code, command["words"][0], "its command", (error.strerror or "can't be executed").lower())


def _failure(code: int, what: str, called: str, why: str) -> dict[str, Any]:
    return {"code": code, "message": f"{what}: {why}", "public": f"{called}: {why}"}


def _offer(variables: dict[str, str]) -> None:
    """Write variables to a file in memory, which the command inherits."""
    with os.fdopen(os.memfd_create("variables"), "w", encoding="utf-8") as file:
        file.writelines(f"{key}={value}\n" for key, value in variables.items())
        file.flush()
        os.dup2(file.fileno(), _VARIABLES)
