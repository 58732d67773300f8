"""The table of roles in docs/security.md, from the one that the server's configuration is made of."""

from __future__ import annotations

from pathlib import Path

from corral.bus.access.matrix import MATRIX
from corral.bus.access.roles import ACCOUNTS, Access, Role, Verb

BEGIN = "<!-- roles: made by docs/generate.py -->"
END = "<!-- end of roles -->"
_SHOWN = (
    Role.COLLECTOR,
    Role.RUNNER,
    Role.PROCESSOR,
    Role.PLANNER,
    Role.NOTIFIER,
    Role.REQUESTER,
    Role.VIEWER,
    Role.OPERATOR,
    Role.GATEWAY,
    Role.ADMIN,
)


def fill(page: Path) -> str:
    """The page with its table as the code has it.

    Raises:
        ValueError: the page has no place for it.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def table() -> str:
    """Every row of the matrix, by what one does."""
    lines = [
        "| | " + " | ".join(_SHOWN) + " |",
        "| --- |" + " :-: |" * len(_SHOWN),
        "| account | " + " | ".join(f"`{ACCOUNTS[role]}`" for role in _SHOWN) + " |",
    ]
    for verb, words in ((Verb.PUBLISH, "**May publish to**"), (Verb.SUBSCRIBE, "**May subscribe to**")):
        lines.append(f"| {words} |" + " |" * len(_SHOWN))
        lines += [_row(access) for access in MATRIX if access.verb is verb]
    return "\n".join(lines) + "\n"


def _row(access: Access) -> str:
    subjects = "<br>".join(f"`{subject}`" for subject in access.subjects)
    only = (" (with `--simulated`)" if access.follows_leases else "") + (" (with `--service`)" if access.serves else "")
    only += " (with `--service`, or `--owner '*'`)" if access.speaks_for_others else ""
    # An administrator's `>` is in every row.
    marks = ["✓" if role in access.roles or role is Role.ADMIN else "–" for role in _SHOWN]
    return f"| {access.what}{only}:<br>{subjects} | " + " | ".join(marks) + " |"
