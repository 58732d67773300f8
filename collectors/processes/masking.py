"""Masking of secrets in command lines. A secret that does not look like one stays: publish few command lines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

MASK: Final = "***"

_NAME: Final = re.compile(
    r"(pass(word|wd|phrase)?|pwd|secret|token|api[-_]?key|apikey|access[-_]?key|private[-_]?key|auth(orization)?|"
    r"bearer|cred(ential)?s?|cookie|session|signature|dsn|conn(ection)?[-_]?str(ing)?)$",
    re.IGNORECASE,
)
"""Ends of the names of options and variables whose values are secret: `--db-password`, `HF_TOKEN`, `apiKey`."""
_OPTION: Final = re.compile(r"(--?)([A-Za-z][A-Za-z0-9_.-]*)")
_ASSIGNED: Final = re.compile(r"(-{0,2}[A-Za-z][A-Za-z0-9_.-]*)=(.*)", re.DOTALL)
_USER_INFO: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^/\s:@]*):[^/\s@]+@")
_IN_QUERY: Final = re.compile(r"([?&][^=&#\s]*(?:token|key|secret|password|sig(?:nature)?)=)[^&#\s]+", re.IGNORECASE)
_INSIDE: Final = re.compile(
    r"((?:--?|\b)[A-Za-z][A-Za-z0-9_.-]*?(?:password|passwd|secret|token|api[-_]?key|access[-_]?key)(?:=|\s+))"
    r"([^\s'\"&|;-][^\s'\"&|;]*)",
    re.IGNORECASE,
)
"""Secrets within an argument that is itself a command, as of `sh -c`."""
_HEADER: Final = re.compile(r"((?:authorization|x-api-key|cookie)\s*:\s*).+", re.IGNORECASE)
_KNOWN: Final = re.compile(
    r"\b(?:"
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|"
    r"glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{16}|ASIA[A-Z0-9]{16}|"
    r"S[UAO][A-Z2-7]{56}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*|AIza[A-Za-z0-9_-]{30,}"
    r")"
)
"""Keys that can be recognized by their form: of model hubs, forges, clouds, NATS, and JSON web tokens."""


def masked(arguments: Iterable[str]) -> list[str]:
    """Replace by `***` each secret in a command's arguments that can be recognized by its name or form."""
    found: list[str] = []
    hidden = False
    for argument in arguments:
        option = _OPTION.fullmatch(argument)
        if hidden and option is None:
            found.append(MASK)
            hidden = False
            continue
        hidden = option is not None and bool(_NAME.search(option[2]))
        assigned = _ASSIGNED.fullmatch(argument)
        if assigned and _NAME.search(assigned[1]):
            found.append(f"{assigned[1]}={MASK}")
        else:
            found.append(_text(argument))
    return found


def _text(argument: str) -> str:
    text = _USER_INFO.sub(rf"\1:{MASK}@", argument)
    text = _IN_QUERY.sub(rf"\1{MASK}", text)
    text = _HEADER.sub(rf"\1{MASK}", text)
    if " " in text:
        text = _INSIDE.sub(rf"\1{MASK}", text)
    return _KNOWN.sub(MASK, text)
