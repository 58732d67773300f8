"""Sessions inside running jobs: what a client asks of the runner of a host, and what that answers.

A client opens a session, and is answered with its id, which nobody else knows. Then it asks, one after the other: for
output, which the runner answers once there is some, and with input, which is answered once it is taken. Each answer
bounds what is under way, and each question may be sent again: its number says which one it is. A session whose client
asks nothing for some seconds ends, with all its processes.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from ..requests import Count
from .jobs import Word
from .runs import RunId

PIECE_BYTES: Final = 64 * 1024
"""Most bytes of input, or of each output, in a message."""
LOST_SECONDS: Final = 15.0
"""A session has ended once its runner, or its client unless that asks for another time, says nothing for so long."""
MOST_WAIT_SECONDS: Final = 5.0
"""Longest time that a runner waits with an answer."""

SessionId = Annotated[str, Meta(min_length=16, max_length=64)]


class TerminalSize(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size of a terminal in characters.

    Attributes:
        rows: number of lines.
        columns: number of characters in a line.
    """

    rows: Annotated[int, Meta(ge=0, le=65535)] = 24
    columns: Annotated[int, Meta(ge=0, le=65535)] = 80


class AttachOpen(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Start a command inside a running job. The subject says who asks: the job's owner, or an operator.

    Attributes:
        run_id: of the task's attempt on this host.
        command: the command with its arguments; empty for a shell.
        terminal: size of the pseudo-terminal; null for pipes.
        terminal_type: value of `TERM` with a pseudo-terminal.
        lost_seconds: the session ends once its client asks nothing for so long.
    """

    run_id: RunId
    command: Annotated[list[Word], Meta(max_length=4096)] = []
    terminal: TerminalSize | None = None
    terminal_type: Annotated[str, Meta(max_length=64, pattern=r"^[A-Za-z0-9_.+-]*$(?!\n)")] = ""
    lost_seconds: Annotated[float, Meta(ge=1, le=3600)] = LOST_SECONDS


class AttachOpened(Struct, frozen=True, kw_only=True, tag="attach_opened", tag_field="type"):
    """A session has begun.

    Attributes:
        session: its id, a secret of the client.
        executor: what confines the job, and so the session: `process`, `systemd`, `podman`, `docker`.
        warnings: fields of the message that this runner does not know and has ignored.
    """

    session: str
    executor: str = ""
    warnings: list[str] = []


class AttachStep(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Go on with a session. A step asks for output, or carries input; two may be under way, one of each.

    Attributes:
        session: id of the session.
        received: number of the last piece of output that has come: the answer has the next one, once there is one. Null
            in a step that does not ask for output.
        wait_seconds: time after which the runner answers in any case.
        number: of this input, from 1; 0 for none. Input that comes again is not written again.
        data: the input, at most `PIECE_BYTES`; in JSON as base64 with padding.
        input_ended: nothing follows this input.
        terminal: new size of the pseudo-terminal; null if it is the same.
        signal: for the command's process group, such as 2 for SIGINT; 0 for none.
        close: end the session with its processes.
    """

    session: SessionId
    received: Count | None = None
    wait_seconds: Annotated[float, Meta(ge=0, le=MOST_WAIT_SECONDS)] = MOST_WAIT_SECONDS
    number: Count = 0
    data: Annotated[bytes, Meta(max_length=PIECE_BYTES)] = b""
    input_ended: bool = False
    terminal: TerminalSize | None = None
    signal: Annotated[int, Meta(ge=0, le=64)] = 0
    close: bool = False


class AttachEnd(StrEnum):
    """Reason why a session has ended."""

    EXITED = "exited"
    """The command has ended."""
    NOT_EXECUTED = "not_executed"
    """The command could not be executed."""
    JOB_ENDED = "job_ended"
    CLOSED = "closed"
    """The client has closed it."""
    LOST = "lost"
    """The session's process on the host was ended, or its client has asked nothing for too long."""


class AttachExit(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """End of a session.

    Attributes:
        end: why it has ended.
        exit_code: of the command; null where a signal ended it, or something else the session.
        signal: that ended it; null if none did.
        message: in words, where it is not the command that has ended.
    """

    end: AttachEnd
    exit_code: int | None = None
    signal: int | None = None
    message: str = ""


class AttachNews(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="attach_news", tag_field="type"):
    """Answer to a step.

    Attributes:
        piece: number of the piece of output in it, from 1; 0 for none.
        output: what the command has written to its standard output, or to its terminal; in JSON as base64.
        error_output: what it has written to its standard error; in JSON as base64.
        taken: number of the last input that the command's input has taken. If it is smaller than that of the step, the
            same step is sent again.
        exit: once the session has ended and there is no further output; null before.
        warnings: fields of the message that this runner does not know and has ignored.
    """

    piece: int = 0
    output: bytes = b""
    error_output: bytes = b""
    taken: int = 0
    exit: AttachExit | None = None
    warnings: list[str] = []
