"""Generate the pages in `docs/` that derive from the code: messages and their schemas, metrics, views, measurements of
services, the command line, settings.

usage: python docs/generate.py [--check]

With --check nothing is written; the exit code is 1 if a file on disk is stale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cli_reference
import instruments_table
import message_examples
import metrics_table
import roles_table
import sbatch_table
import telemetry_page
from corral.gateway import openapi
from corral.processors import views
from corral.schemas import codec, json_schema
from corral.schemas.channels import CHANNELS, Channel, Message
from corral.schemas.query import END_HEADER, PART_HEADER, QueryEnd
from corral.schemas.replies import ERROR_CODE_HEADER, ERROR_HEADER, STATUS

DOCS = Path(__file__).parent
REFERENCE = DOCS / "reference"


def _messages() -> dict[str, Message]:
    found: dict[str, Message] = {}
    for channel in CHANNELS:
        for message in ([channel.message] if channel.message else []) + list(channel.replies):
            found.setdefault(message.__name__, message)
    # What stands in the header `Corral-End`.
    return {**found, QueryEnd.__name__: QueryEnd}


def _components() -> dict[str, Any]:
    found = json_schema.components(_messages().values())
    found["SampleBatch"]["properties"] |= telemetry_page.columns(found["SampleBatch"]["properties"])
    return found


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


def _header_schemas() -> dict[str, Any]:
    """What headers of messages say, by the kind of message."""
    content = _text("of the body; JSON where it is left out", enum=[codec.JSON, codec.MSGPACK])
    warnings = _text(
        "what was ignored in the question",
        contentMediaType=codec.JSON,
        contentSchema={"type": "array", "items": {"type": "string"}},
    )
    reply = {
        codec.CONTENT_TYPE_HEADER: {**content, "description": "as the question's"},
        codec.WARNINGS_HEADER: warnings,
    }
    error = {
        ERROR_HEADER: _text("the message of the error in a line of ASCII, cut to 256 characters"),
        ERROR_CODE_HEADER: _text("its status, after HTTP", enum=sorted(set(STATUS.values()))),
    }
    end = _text(
        "of the last part alone", contentMediaType=codec.JSON, contentSchema={"$ref": "#/components/schemas/QueryEnd"}
    )
    parts = {PART_HEADER: _text("number of the part, from 0", pattern="^[0-9]+$"), END_HEADER: end}
    rows = _text(
        "of the parts joined", enum=sorted(("text/csv", "application/vnd.apache.arrow.stream", *content["enum"]))
    )
    line = _text("names the one who asks again while it waits, anything of one's own", maxLength=128)
    kinds: dict[str, tuple[str, dict[str, Any], list[str]]] = {
        "RequestHeaders": ("Headers of a request.", {codec.CONTENT_TYPE_HEADER: content, codec.LINE_HEADER: line}, []),
        "ReplyHeaders": ("Headers of a reply.", reply, [codec.CONTENT_TYPE_HEADER]),
        "ErrorHeaders": (
            "Headers of an `Error`, as NATS services have them.",
            {**reply, **error, **parts},
            sorted(error),
        ),
        "QueryHeaders": (
            "Headers of each part of the answer to a query.",
            {codec.CONTENT_TYPE_HEADER: rows, codec.WARNINGS_HEADER: warnings, **parts},
            [codec.CONTENT_TYPE_HEADER, PART_HEADER],
        ),
        "EventHeaders": (
            "Headers of what is published.",
            {codec.CONTENT_TYPE_HEADER: content, "Nats-Msg-Id": _text("the stream stores an id once")},
            [],
        ),
    }
    return {
        name: {"title": name, "description": text, "type": "object", "properties": properties, "required": required}
        for name, (text, properties, required) in kinds.items()
    }


def _headers_of(name: str, asked: set[str], published: set[str]) -> str:
    if name in published:
        return "EventHeaders"
    return {"Error": "ErrorHeaders", "QueryResult": "QueryHeaders"}.get(
        name, "RequestHeaders" if name in asked else "ReplyHeaders"
    )


def json_schemas() -> dict[Path, str]:
    """One self-contained JSON Schema a message."""
    files: dict[Path, str] = {}
    components = {**_components(), **_header_schemas()}
    for name in [*_messages(), *_header_schemas()]:
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
    asked = {channel.message.__name__ for channel in CHANNELS if channel.message and channel.replies}
    published = {channel.message.__name__ for channel in CHANNELS if channel.message and not channel.replies}
    examples = message_examples.examples()
    for name, message in _messages().items():
        if message is QueryEnd:
            continue
        kinds = {channel.content_types[0] for channel in CHANNELS if channel.message is message}
        messages[name] = {
            "name": name,
            "summary": json_schema.summary(message),
            "contentType": next(iter(kinds), "application/json"),
            "headers": {"$ref": f"#/components/schemas/{_headers_of(name, asked, published)}"},
            "payload": {"$ref": f"#/components/schemas/{name}"},
        }
        if name in examples:
            messages[name]["examples"] = [{"summary": summary, "payload": body} for summary, body in examples[name]]
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
            "description": "GPU fleet telemetry, history and placement on one message bus.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "local": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "The URL that `corral context export` prints; with TLS if it also prints a CA.",
                "security": [{"$ref": "#/components/securitySchemes/nkey"}],
            }
        },
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": messages,
            "schemas": {**_components(), **_header_schemas()},
            "securitySchemes": {
                "nkey": {
                    "type": "asymmetricEncryption",
                    "description": "An NKey (Ed25519): the client signs the server's nonce with the seed in its "
                    "credentials file (`CORRAL_NATS_CREDS`). Answers are only delivered to `_INBOX.{user}.>`.",
                },
                "certificate": {
                    "type": "X509",
                    "description": "Additionally, if the bus requires client certificates.",
                },
            },
        },
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


_PROSE = """\
# Messages

Generated from `schemas/` by `make docs`. Telemetry is MessagePack ([how to decode it](telemetry.md)). Requests are
JSON, or MessagePack with the header `Content-Type: application/msgpack`. A reply has the content type of its request,
and a `Content-Type` header. Every event and reply has its name in the field `type`; events of earlier versions have
none.

In MessagePack a message has the same fields. A time is the timestamp extension (type -1) instead of RFC 3339 text, both
to the microsecond, and bytes are `bin`; the schemas have this in `x-msgpack-type`.

A field that a request or an event leaves out has the default in the tables below. A reply has all its fields. An
unknown field is ignored, and listed in `warnings` and in the header `Corral-Warnings`. A field whose name is almost
that of a known one is an error, and so is an empty message where a request needs content.

"""

_NAMES = """\
The servers of `corral auth`, `corral up` and `compose.yaml` allow each client only its own name in a subject, so the
name is reliable. Without `{owner}`, `{user}` or `{operator}` at the end, the same subjects are answered there with the
error `refused`, which names the right subject; on a bus without authentication they are answered by the owner in the
body. Subjects of the planner for which the table has no name at the end, `corral.v1.history.cancel` and
`corral.v1.history.status` accept any name there, which has no effect."""


def message_reference() -> str:
    """The table of subjects, and each message with its fields."""
    lines = [
        *_PROSE.splitlines(),
        "An error has the numeric status of its `code` in the header `Nats-Service-Error-Code`, and its message in",
        "`Nats-Service-Error`: "
        + ", ".join(f"{status} `{'`, `'.join(codes)}`" for status, codes in _codes_by_status().items())
        + "; 500 for any other.",
        "",
        "## Subjects",
        "",
        "| subject | from → to | message | answers | kept in |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_channel_row(channel) for channel in CHANNELS]
    lines += [
        "",
        "| in a subject | meaning |",
        "| --- | --- |",
        *(f"| `{{{name}}}` | {text} |" for name, text in _parameters().items()),
        "",
        *_NAMES.splitlines(),
        "",
        "## Headers",
        "",
        *_header_table(),
        "## JSON Schemas",
        "",
        "One self-contained file per message. [AsyncAPI](asyncapi.json) has them all.",
        "",
    ]
    lines += [
        ", ".join(f"[{name}](schemas/{name}.json)" for name in sorted([*_messages(), *_header_schemas()])) + ".",
        "",
    ]
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


def _codes_by_status() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for code, status in sorted(STATUS.items(), key=lambda item: item[1]):
        found.setdefault(status, []).append(code)
    return found


def _parameters() -> dict[str, str]:
    found: dict[str, str] = {}
    for channel in CHANNELS:
        for name, text in channel.parameters.items():
            found.setdefault(name, text)
    return found


def _header_table() -> list[str]:
    lines = ["| header | of | meaning |", "| --- | --- | --- |"]
    of: dict[tuple[str, str], list[str]] = {}
    for name, schema in _header_schemas().items():
        for header, part in schema["properties"].items():
            words = f"{part['description']}: {_type_words(part)}" if "enum" in part else part["description"]
            of.setdefault((header, words), []).append(name)
    lines += [f"| `{header}` | {', '.join(names)} | {words} |" for (header, words), names in of.items()]
    return [*lines, ""]


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
    if part.get("x-msgpack-type") == "bin":
        return "bytes"
    return part.get("format") or str(part.get("type", "any"))


def files() -> dict[Path, str]:
    """Every generated file with its text."""
    from importlib.metadata import version

    return {
        **json_schemas(),
        REFERENCE / "asyncapi.json": asyncapi(version("corral")),
        REFERENCE / "openapi.json": json.dumps(json.loads(openapi.document()), indent=2, ensure_ascii=False) + "\n",
        REFERENCE / "messages.md": message_reference(),
        REFERENCE / "telemetry.md": telemetry_page.render(),
        REFERENCE / "cli.md": cli_reference.commands(),
        REFERENCE / "configuration.md": cli_reference.configuration(),
        DOCS / "views.md": views.document(),
        DOCS / "metrics.md": metrics_table.render(),
        DOCS / "security.md": roles_table.fill(DOCS / "security.md"),
        DOCS / "jobs.md": sbatch_table.fill(DOCS / "jobs.md"),
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
