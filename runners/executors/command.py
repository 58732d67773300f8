"""Commands as a supervisor starts them, and how an executor confines them."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ...schemas.requests import Grant
from ...schemas.work.runs import Run
from ..accounts import Account


class Command(Struct, frozen=True, kw_only=True):
    """A command with its environment.

    Attributes:
        words: the command and its arguments.
        environment: all of its environment.
        variables: further ones, that it finds as lines of the file `VARIABLES_FILE`: those of a container, which must
            not affect the client of the container itself.
    """

    words: list[str]
    environment: dict[str, str]
    variables: dict[str, str] = {}


class Confined(Struct, frozen=True, kw_only=True):
    """Command for a supervisor to execute.

    Attributes:
        commands: one for each process.
        account: that they are executed as; None for the runner's own.
        unit: options of `systemd-run` for the supervisor's own unit; None to fork it from the zygote.
        finish: commands that remove what is left of the run, apart from its processes.
    """

    commands: list[Command]
    account: Account | None = None
    unit: list[str] | None = None
    finish: list[list[str]] = []


class Work(Struct, frozen=True, kw_only=True):
    """Command and limits of a run that is to be confined.

    Attributes:
        key: name of the run.
        run: the run.
        account: of the owner.
        commands: one for each process.
        directory: working directory.
        folder: that has the script and the output.
        image: container image; empty for none.
    """

    key: str
    run: Run
    account: Account
    commands: list[Command]
    directory: str
    folder: str
    image: str = ""

    @property
    def switched(self) -> Account | None:
        """The account, if it is not the runner's own."""
        return self.account if self.account.switched else None


def limits(grants: Sequence[Grant]) -> tuple[float, int]:
    """Cores and bytes of RAM that were granted; 0 for no limit."""
    return sum(grant.cpus for grant in grants), sum(grant.host_memory_bytes for grant in grants)
