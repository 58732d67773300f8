"""Options of the command line in place of fields of messages, in errors about these.

The planner, and the client before it sends a message, name the field that is invalid: `$.book.reason`. Whoever typed a
command knows its options: `--reason`. The option is found by its name among those of the command.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

_AT: Final = " - at `"
_PARTS: Final = re.compile(r"[A-Za-z_]+")
_FIELD_IN_TEXT: Final = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")
_OTHERWISE: Final[Mapping[str, tuple[str, ...]]] = {
    "gpus_max": ("gpus",),
    "gpu_memory_bytes": ("memory",),
    "gpu_share": ("share",),
    "expected_seconds": ("expect",),
    "distribution": ("items",),
    "starts_at": ("begin", "start"),
    "ends_at": ("until", "duration", "begin"),
    "environment": ("env",),
    "directory": ("cd",),
    "preempt_signal": ("on_preempt",),
    "held": ("hold",),
    "job_ids": ("which", "job"),
    "job_id": ("which", "job"),
    "cancel": ("window_id",),
    "states": ("state",),
    "busy_seconds": ("time",),
    "context_tokens": ("context",),
    "prompt_tokens": ("prompt",),
    "max_token_seconds": ("max_token_time",),
    "max_first_token_seconds": ("max_first_token_time",),
    "with_more": ("more",),
}
"""Names of options by field, where they differ otherwise than in unit and number."""


def options_of(command: Any) -> dict[str, str]:
    """Options of a command as they are typed, by the names of their parameters; arguments as the help shows them."""
    found: dict[str, str] = {}
    for each in command.params:
        long = [text for text in (*each.opts, *each.secondary_opts) if text.startswith("--")]
        shown = long[0] if long else (each.metavar or "").strip("[].") or each.name.upper()
        found[each.name] = shown
    return found


def option_of(path: str, options: Mapping[str, str]) -> str:
    """The option for a field, or for the innermost field around it that has one; empty if there is none.

    Args:
        path: of the field, such as `$.book.reason`.
        options: of the command, by name.
    """
    parts = _PARTS.findall(path)
    if "with_more" in parts:
        parts = ["with_more"]  # one option has all parts of an addition, and its model is not that of the command
    for part in reversed(parts):
        for name in _names(part):
            if name in options:
                return options[name]
    return ""


def _names(field: str) -> Iterator[str]:
    yield field
    yield from _OTHERWISE.get(field, ())
    plain = field.removesuffix("_seconds").removesuffix("_bytes")
    yield plain
    yield plain.removesuffix("s")
    yield plain.removesuffix("_id")
    yield f"{plain.removesuffix('_id')}_ids"


def in_options(message: str, path: str, options: Mapping[str, str]) -> str:
    """Put an error about a field in the words of a command; as it is if the command has no option for the field.

    Args:
        message: of the error; the path of the field may be at its end.
        path: of the field; empty if the message has it, or no field is at fault.
        options: of the command, by name.
    """
    head, at, end = message.rpartition(_AT)
    text, path = (head, end.rstrip("`")) if at else (message, path)
    option = option_of(path, options)
    if path and not option:
        return message if at else f"{message} ({path})"
    parts = _PARTS.findall(path)
    if parts and text.startswith(f"{parts[-1]} "):
        text = option + text.removeprefix(parts[-1])
    text = _FIELD_IN_TEXT.sub(lambda found: option_of(found[0], options) or found[0], text)
    return text if option in text else f"{option}: {text}"


def name_options(command: Any) -> None:
    """Have a command name its options in errors about fields."""
    work = command.callback
    if work is None:
        return

    @functools.wraps(work)
    def called(*given: Any, **named: Any) -> Any:
        try:
            return work(*given, **named)
        except Exception as error:
            from ..client.errors import InvalidRequest

            if isinstance(error, InvalidRequest):
                error.args = (in_options(str(error), error.field, options_of(command)),)
                error.field = ""
            raise

    command.callback = called
