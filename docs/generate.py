"""Write what `docs/` derives from the code: messages and their schemas, metrics, views, what services measure,
the command line, settings.

usage: python docs/generate.py [--check]

With --check nothing is written; the exit code is 1 where a file on disk differs from what the code says.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cli_reference
import instruments_table
import metrics_table
import msgspec
import roles_table
from corral.processors import views
from corral.schemas.channels import CHANNELS, Channel, Message

DOCS = Path(__file__).parent
REFERENCE = DOCS / "reference"


def _messages() -> dict[str, Message]:
    found: dict[str, Message] = {}
    for channel in CHANNELS:
        for message in ([channel.message] if channel.message else []) + list(channel.replies):
            found.setdefault(message.__name__, message)
    return found


def _summary(message: Message) -> str:
    return (inspect.getdoc(message) or "").split("\n\n")[0].replace("\n", " ")


def _attributes(message: Message) -> dict[str, str]:
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


def _components() -> dict[str, Any]:
    _, components = msgspec.json.schema_components(
        list(_messages().values()), ref_template="#/components/schemas/{name}"
    )
    classes = {cls.__name__: cls for module in _schema_modules() for cls in vars(module).values() if _is_struct(cls)}
    for name, schema in components.items():
        described = _attributes(classes[name]) if name in classes else {}
        if name in classes:
            schema["description"] = _summary(classes[name])
        for field, text in described.items():
            if field in schema.get("properties", {}):
                schema["properties"][field]["description"] = text
    return dict(sorted(components.items()))


def _schema_modules() -> list[ModuleType]:
    from corral.schemas import operations, query, requests, telemetry

    return [telemetry, requests, operations, query]


def _is_struct(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, msgspec.Struct)


def json_schemas() -> dict[Path, str]:
    """One self-contained JSON Schema a message."""
    files: dict[Path, str] = {}
    components = _components()
    for name in _messages():
        needed: dict[str, Any] = {}

        def take(node: Any, needed: dict[str, Any] = needed) -> None:
            if isinstance(node, dict):
                reference = node.get("$ref", "")
                part = reference.rpartition("/")[2]
                if reference and part not in needed:
                    needed[part] = components[part]
                    take(components[part])
                for value in node.values():
                    take(value)
            elif isinstance(node, list):
                for value in node:
                    take(value)

        take(components[name])
        needed.pop(name, None)
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **components[name]}
        if needed:
            schema["$defs"] = dict(sorted(needed.items()))
        text = json.dumps(schema, indent=2, ensure_ascii=False).replace("#/components/schemas/", "#/$defs/")
        files[REFERENCE / "schemas" / f"{name}.json"] = text.replace(f'"#/$defs/{name}"', '"#"') + "\n"
    return files


def asyncapi(version: str) -> str:
    """The bus as an AsyncAPI 3.0 document (JSON, which is YAML too)."""
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    for name, message in _messages().items():
        kinds = {channel.content_types[0] for channel in CHANNELS if channel.message is message}
        messages[name] = {
            "name": name,
            "summary": _summary(message),
            "contentType": next(iter(kinds), "application/json"),
            "payload": {"$ref": f"#/components/schemas/{name}"},
        }
    for channel in CHANNELS:
        entry: dict[str, Any] = {"address": channel.subject, "description": channel.summary}
        if channel.parameters:
            entry["parameters"] = {key: {"description": text} for key, text in channel.parameters.items()}
        if channel.message:
            name = channel.message.__name__
            entry["messages"] = {name: {"$ref": f"#/components/messages/{name}"}}
        channels[channel.name] = entry
        operation: dict[str, Any] = {
            "action": "send",
            "channel": {"$ref": f"#/channels/{channel.name}"},
            "summary": f"{channel.publisher} → {channel.subscriber}: {channel.summary}",
        }
        if channel.replies:
            reply = f"{channel.name}_reply"
            channels[reply] = {
                "address": None,
                "description": f"Answers to {channel.name}, on the reply subject of the request.",
                "messages": {m.__name__: {"$ref": f"#/components/messages/{m.__name__}"} for m in channel.replies},
            }
            operation["reply"] = {"channel": {"$ref": f"#/channels/{reply}"}}
        operations[channel.name] = operation
    document = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Corral",
            "version": version,
            "description": "A GPU fleet that senses, remembers and places, on one message bus.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"local": {"host": "127.0.0.1:4222", "protocol": "nats"}},
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": _components()},
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def message_reference() -> str:
    """The table of subjects, and each message with its fields."""
    lines = [
        "# Messages",
        "",
        "Generated from `schemas/` by `make docs`. Telemetry is MessagePack. Requests are JSON, or MessagePack with",
        "the header `Content-Type: application/msgpack`; a reply comes in the type of its request.",
        "",
        "## Subjects",
        "",
        "| subject | from → to | message | answers | kept in |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_channel_row(channel) for channel in CHANNELS]
    lines += [
        "",
        "## JSON Schemas",
        "",
        "One file a message, whole in itself. [AsyncAPI](asyncapi.json) has them all.",
        "",
    ]
    lines += [", ".join(f"[{name}](schemas/{name}.json)" for name in sorted(_messages())) + ".", ""]
    lines += ["## Fields", ""]
    for name, schema in _components().items():
        lines += [f"### {name}", "", schema.get("description", ""), ""]
        if "enum" in schema:
            lines += ["One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + ".", ""]
            continue
        lines += ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
        for field, part in schema.get("properties", {}).items():
            default = "required" if field in schema.get("required", ()) else f"`{json.dumps(part.get('default'))}`"
            text = part.get("description", "").replace("|", "\\|")
            lines.append(f"| `{field}` | {_type_words(part)} | {default} | {text} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _channel_row(channel: Channel) -> str:
    def link(message: Message) -> str:
        return f"[{message.__name__}](#{message.__name__.lower()})"

    return (
        f"| `{channel.subject}` | {channel.publisher} → {channel.subscriber} "
        f"| {link(channel.message) if channel.message else '(empty)'} "
        f"| {', '.join(link(reply) for reply in channel.replies) or '–'} "
        f"| {f'`{channel.stream}`' if channel.stream else '–'} |"
    )


def _type_words(part: dict[str, Any]) -> str:
    if "$ref" in part:
        name = part["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in part:
        return " or ".join(_type_words(option) for option in part["anyOf"])
    if "enum" in part:
        return " or ".join(f"`{json.dumps(value)}`" for value in part["enum"])
    if part.get("type") == "array":
        return f"list of {_type_words(part['items'])}" if part.get("items") else "list"
    if part.get("type") == "object":
        inner = part.get("additionalProperties")
        return f"map to {_type_words(inner)}" if isinstance(inner, dict) and inner else "map"
    if part.get("contentEncoding") == "base64":
        return "bytes"
    return part.get("format") or str(part.get("type", "any"))


def files() -> dict[Path, str]:
    """Every generated file with its text."""
    from importlib.metadata import version

    return {
        **json_schemas(),
        REFERENCE / "asyncapi.json": asyncapi(version("corral")),
        REFERENCE / "messages.md": message_reference(),
        REFERENCE / "cli.md": cli_reference.commands(),
        REFERENCE / "configuration.md": cli_reference.configuration(),
        DOCS / "views.md": views.document(),
        DOCS / "metrics.md": metrics_table.render(),
        DOCS / "security.md": roles_table.fill(DOCS / "security.md"),
        REFERENCE / "services.md": instruments_table.render(),
    }


def main() -> int:
    """Write the files, or check them; the exit code says whether they were fresh."""
    stale = [path for path, text in files().items() if not path.exists() or path.read_text() != text]
    known = {path for path in files() if path.parent == REFERENCE / "schemas"}
    left = [path for path in (REFERENCE / "schemas").glob("*.json") if path not in known]
    if "--check" in sys.argv[1:]:
        for path in stale + left:
            print(f"{path.relative_to(DOCS.parent)} is stale: run `make docs`")
        return 1 if stale or left else 0
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in left:
        path.unlink()
    print(f"{len(stale)} written, {len(left)} removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
