"""The published contract, read as a client in another language would, compared with the services' behavior."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from corral.schemas import codec, operations, query, requests
from corral.schemas.channels import CHANNELS
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import SampleBatch
from corral.schemas.values import durations
from corral.schemas.work import attach, groups, jobs, moves, notifications, runs, windows
from jsonschema import Draft202012Validator, FormatChecker

REFERENCE = Path(__file__).parents[2] / "docs/reference"
SCHEMAS: dict[str, Any] = {file.stem: json.loads(file.read_text()) for file in (REFERENCE / "schemas").glob("*.json")}
ASYNCAPI: dict[str, Any] = json.loads((REFERENCE / "asyncapi.json").read_text())
ASKED = {channel.message for channel in CHANNELS if channel.message and channel.replies}
BASE: dict[type[Any], dict[str, Any]] = {
    requests.WorkRequest: {},
    requests.LeaseAction: {"lease_id": "l"},
    requests.WithdrawAction: {"request_id": "r"},
    operations.ExplainRequest: {"request": {}},
    operations.LeaseFilter: {},
    operations.DeviceFilter: {},
    operations.QueueFilter: {},
    operations.DrainAction: {"drain": True},
    operations.EvictAction: {"lease_id": "l", "reason": "r"},
    operations.PreemptAction: {"lease_id": "l", "reason": "r"},
    requests.CheckpointAction: {"lease_id": "l"},
    requests.ResizeAction: {"lease_id": "l"},
    groups.GroupFilter: {},
    groups.GroupChange: {},
    windows.WindowFilter: {},
    moves.MovesQuery: {},
    windows.WindowAction: {"cancel": "w"},
    query.QueryRequest: {"sql": "SELECT 1"},
    query.CancelRequest: {"query_id": "q"},
    query.SnapshotRequest: {},
    query.SnapshotRead: {"snapshot_id": "s"},
    durations.DurationsRequest: {},
    jobs.JobSpec: {"request": {}},
    jobs.JobAction: {"job_id": "1234", "verb": "show"},
    jobs.OverrideAction: {"action": {"job_id": "1234", "verb": "show"}},
    jobs.JobFilter: {},
    notifications.NotifyAction: {},
    notifications.NotifyOverride: {},
    runs.RunnerReport: {"host": "h", "runner": "r"},
    attach.AttachOpen: {"run_id": "1234_0.1"},
    attach.AttachStep: {"session": "0123456789abcdef"},
}
"""The least that each request says."""


WITH_REQUEST = (operations.ExplainRequest, jobs.JobSpec)
"""Messages with a request whose owner the subject says."""


def resolved(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def boundaries(node: dict[str, Any], root: dict[str, Any]) -> list[Any]:
    """Values of every type, and those about the limits of a field."""
    found: list[Any] = [
        *(None, "", "x", 0, 1, -1, 1.0, 1.5, -0.5, True, [], {}, ["x"], {"a": "b"}, [None], {"a": 1}, "\0", "é", "a b"),
        *(2**53, 2**53 + 1, 2**63, 2**64, 1e300, "x" * 300, "x" * 20_000),
    ]
    for option in resolved(node, root).get("anyOf", [resolved(node, root)]):
        part = resolved(option, root)
        for limit in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if limit in part:
                found += [part[limit] + step for step in (-1, 0, 1)] + [float(part[limit])]
        if "maxLength" in part:
            found += ["x" * (part["maxLength"] + more) for more in (0, 1)]
        if "maxItems" in part:
            found += [["x"] * (part["maxItems"] + more) for more in (0, 1)]
        found += part.get("enum", [])
    return found


@pytest.mark.parametrize("message", BASE, ids=lambda message: message.__name__)
def test_a_schema_takes_what_the_service_takes(message: type[Any]) -> None:
    assert set(BASE) == ASKED, "a request is missing here"
    schema = SCHEMAS[message.__name__]
    said = next(channel.said_by_subject for channel in CHANNELS if channel.message is message)
    subject = {said: "ann"} if said else {}
    valid = Draft202012Validator(schema).is_valid
    for field, part in {**schema["properties"], "quantum": {}}.items():
        if part.get("x-msgpack-type") == "bin":
            continue  # JSON Schema has no word for bytes
        for value in boundaries(part, schema):
            body = {**BASE[message], field: value}
            whole = {**subject, **body}
            if message in WITH_REQUEST and isinstance(whole["request"], dict):
                whole["request"] = {"owner": "ann", **whole["request"]}
            for content in (codec.JSON, codec.MSGPACK):
                try:
                    codec.decode_request(codec.encode(whole, content), message, content)
                    taken = True
                except OverflowError:
                    continue  # MessagePack has no such number
                except codec.DecodeError as error:
                    if "did you mean" in str(error):
                        continue
                    taken = False
                assert valid(body) == taken, (field, repr(value)[:60], content)


def test_examples_are_valid_and_taken() -> None:
    taken = {message.__name__: message for message in BASE}
    shown = 0
    for name, message in ASYNCAPI["components"]["messages"].items():
        for example in message.get("examples", ()):
            check = Draft202012Validator(SCHEMAS[name], format_checker=FormatChecker(["date-time"]))
            assert list(check.iter_errors(example["payload"])) == [], name
            if name in taken:
                said = next(channel.said_by_subject for channel in CHANNELS if channel.message is taken[name])
                body = {**({said: "ann"} if said else {}), **example["payload"]}
                if taken[name] in WITH_REQUEST:
                    body["request"]["owner"] = "ann"
                _, warnings = codec.decode_request(codec.encode(body, codec.JSON), taken[name])
                assert warnings == []
            shown += 1
    without = {name for name, message in ASYNCAPI["components"]["messages"].items() if "examples" not in message}
    assert without == {"SampleBatch", "DeadLetter", "LogChunk"}, "only bytes can't be shown"
    assert shown >= len(ASYNCAPI["components"]["messages"]) - 3


def nodes(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [found for value in node for found in nodes(value)]
    if not isinstance(node, dict):
        return []
    return [node, *(found for value in node.values() for found in nodes(value))]


def test_schemas_say_nothing_that_readers_refuse() -> None:
    for name, schema in SCHEMAS.items():
        Draft202012Validator.check_schema(schema)
        for node in nodes(schema):
            if isinstance(pattern := node.get("pattern"), str):
                assert "(?" not in pattern, f"{name}: RE2 knows no look-ahead"
                assert re.compile(pattern)
            assert "contentEncoding" not in node, f"{name}: bytes are bin, not base64"
            assert node.get("additionalProperties") is not False, f"{name}: what is not known is ignored"
    for name, field in (("Lease", "granted_at"), ("LeaseEvent", "time")):
        assert SCHEMAS[name]["properties"][field]["format"] == "date-time"


def test_every_column_has_its_type_in_the_schema_and_on_the_page() -> None:
    page = (REFERENCE / "telemetry.md").read_text()
    properties = SCHEMAS["SampleBatch"]["properties"]
    columns = properties["columns"]["properties"]
    assert set(columns) == set(METRICS)
    for name, metric in METRICS.items():
        kind = {"<f4": "float32", "<i4": "int32", "<i8": "int64"}[metric.row.unit.dtype]
        assert (columns[name]["x-element-type"], columns[name]["x-msgpack-type"]) == (kind, "bin")
        assert f"| `{name}` | {kind} | {int(kind[-2:]) // 8} |" in page
    # The bytes that the page shows are a batch, and say what the page says.
    shown = "".join(page.partition("```text\n")[2].partition("```")[0].split())
    batch = codec.decode(bytes.fromhex(shown), SampleBatch)
    assert Draft202012Validator(SCHEMAS["SampleBatch"]).is_valid(codec.decode(bytes.fromhex(shown), dict[str, Any]))
    assert batch.nulls["memory_used_bytes"] == b"\0\1"


def test_addresses_say_who_asks() -> None:
    addresses = {channel["address"] for channel in ASYNCAPI["channels"].values() if channel["address"]}
    for what, name in (
        *((f"plan.{verb}", "owner") for verb in ("request", "withdraw", "renew", "release", "submit", "job")),
        *((f"plan.{verb}", "operator") for verb in ("drain", "evict", "set_groups", "book", "job_override")),
        *((what, "user") for what in ("plan.explain", "query", "history.snapshot", "history.read")),
    ):
        assert f"corral.v1.{what}.{{{name}}}" in addresses
        assert f"corral.v1.{what}" not in addresses
    for channel in ASYNCAPI["channels"].values():
        wanted = set(re.findall(r"{(\w+)}", channel["address"] or ""))
        assert set(channel.get("parameters", ())) == wanted
    assert ASYNCAPI["servers"]["local"]["security"] == [{"$ref": "#/components/securitySchemes/nkey"}]
    assert all("headers" in message for message in ASYNCAPI["components"]["messages"].values())
