"""JSON Schemas of messages for readers in any language, with the descriptions of their docstrings.

AsyncAPI, OpenAPI and the reference derive from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Final, cast

import msgspec

from . import health, operations, query, requests, telemetry
from .channels import CHANNELS, Message
from .models import description, serving
from .work import groups, jobs, moves, notifications, runs, windows

_MODULES: Final[tuple[ModuleType, ...]] = (
    telemetry,
    requests,
    operations,
    groups,
    windows,
    moves,
    jobs,
    runs,
    query,
    health,
    notifications,
    description,
    serving,
)
"""Where the classes of the schemas are, for their docstrings."""
_LOOK_AHEAD: Final = r"(?!\n)"
"""Behind `$` it says the same to Python that `$` alone says to ECMA, RE2 and Rust; the latter two refuse it."""


def summary(message: Message) -> str:
    """The first paragraph of a message's docstring, in one line."""
    return (inspect.getdoc(message) or "").split("\n\n")[0].replace("\n", " ")


def attributes(message: Message) -> dict[str, str]:
    """The `Attributes:` of a docstring, field by field."""
    found: dict[str, str] = {}
    field, inside = "", False
    for line in (inspect.getdoc(message) or "").splitlines():
        if line.strip() == "Attributes:":
            inside = True
        elif inside and line.startswith("    ") and not line.startswith("     "):
            field, _, text = line.strip().partition(": ")
            found[field] = text
        elif inside and line.startswith("     ") and field:
            found[field] += " " + line.strip()
        elif line.strip():
            inside = False
    return found


def components(messages: Iterable[Message]) -> dict[str, Any]:
    """Schemas of messages and of all types in them, by name; references lead to `#/components/schemas/NAME`."""
    _, found = msgspec.json.schema_components(list(messages), ref_template="#/components/schemas/{name}")
    classes = {cls.__name__: cls for module in _MODULES for cls in vars(module).values() if _is_struct(cls)}
    said = {channel.message.__name__: channel.said_by_subject for channel in CHANNELS if channel.message}
    for name, schema in found.items():
        described = attributes(classes[name]) if name in classes else {}
        if name in classes:
            schema["description"] = summary(classes[name])
        for field, text in described.items():
            if field in schema.get("properties", {}):
                schema["properties"][field]["description"] = text
        if field := said.get(name):
            part = schema["properties"][field]
            part["description"] = f"{part['description'].rstrip('.')}. May be left out where the subject says it."
            schema["required"] = [one for one in schema.get("required", ()) if one != field]
        as_others_read(schema)
    return dict(sorted(found.items()))


def as_others_read(node: Any) -> None:
    """Change a schema in place to what holds for any reader.

    Patterns are of any dialect, bytes and times as they travel, and an unknown field is ignored with a warning.
    """
    if isinstance(node, list):
        for value in cast("list[Any]", node):
            as_others_read(value)
        return
    if not isinstance(node, dict):
        return
    node = cast("dict[str, Any]", node)
    if isinstance(node.get("pattern"), str):
        node["pattern"] = node["pattern"].removesuffix(_LOOK_AHEAD)
    if node.get("additionalProperties") is False:
        del node["additionalProperties"]
    if node.get("contentEncoding") == "base64":
        # JSON Schema has no word for bytes: any type is let through, and this says which it is.
        del node["contentEncoding"], node["type"]
        node["x-msgpack-type"] = "bin"
    if node.get("format") == "date-time":
        node["x-msgpack-type"] = "timestamp"
    for value in node.values():
        as_others_read(value)


def _is_struct(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, msgspec.Struct)
