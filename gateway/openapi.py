"""The gateway's interface as an OpenAPI 3.1 document, from the messages that the bus uses."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

import msgspec

from ..schemas import codec, json_schema
from ..schemas.channels import Channel, Message
from ..schemas.operations import Queue
from ..schemas.query import QueryEnd
from ..schemas.requests import Assignment, Error, Rejection
from .answers import REJECTED
from .routes import ROUTES, Kind, Route, is_list
from .streams import EVENT_STREAM

_ERRORS: Final = {
    "400": "The request is wrong: `field` is the path of what is.",
    "401": "The token is missing, or the bus does not know it (any more).",
    "403": "The bus does not let the token's user do this.",
    "408": "The body came too slowly.",
    "413": "The request, or its answer, is larger than a message may be.",
    "415": "The body is no JSON.",
    "421": "The server has another host name.",
    "429": "Too many requests; `Retry-After` says when to try again.",
    "500": "The gateway or a service failed.",
    "503": "The bus or a service is away, or has too much to do; try again after `Retry-After`.",
    "504": "A service did not answer in time. What was asked may have been done.",
}
_ABOUT_ONE: Final = {
    "404": "There is no such lease, job, device or request.",
    "409": "The state of what it is about does not allow it.",
    "410": "It has ended.",
}
_DESCRIPTION: Final = """\
What Corral's bus offers to users, over HTTP. Each path is a channel of the bus: bodies and answers are its messages.

A token is credentials of the bus, and may do what these may: `corral auth token` makes it. A field for the caller's own
name (`owner`, `operator`) may be left out. A field that is not known is ignored, and named in `warnings` and in the
header `Corral-Warnings`; one that looks misspelt is an error.
"""


def document() -> bytes:
    """The document as JSON."""
    return msgspec.json.encode(as_dict())


def as_dict() -> dict[str, Any]:
    """The document."""
    messages: dict[str, Message] = {each.__name__: each for each in (Error, Queue, QueryEnd)}
    for route in ROUTES.values():
        if route.channel is not None:
            for message in (route.channel.message, *route.channel.replies):
                if message is not None and (message is route.channel.message or not route.parameters):
                    messages[message.__name__] = message
            messages |= {message.__name__: message for message in route.channel.replies}
    schemas = json_schema.components(messages.values())
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Corral",
            "version": version("corral"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The gateway that serves this document."}],
        "security": [{"token": []}],
        "paths": {path: {route.method.lower(): _operation(route)} for path, route in ROUTES.items()},
        "components": {
            "schemas": schemas,
            "responses": {
                f"Error{status}": {
                    "description": text,
                    "content": {codec.JSON: {"schema": _reference(Error)}},
                    **({"headers": _retry_after()} if status in ("429", "503") else {}),
                }
                for status, text in (_ERRORS | _ABOUT_ONE).items()
            },
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token of `corral auth token`. It is as secret as credentials are.",
                }
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "responses": {"200": _success(route), **_failures(route)},
    }
    if route.parameters is not None:
        operation["parameters"] = _parameters(route.parameters)
    elif route.channel is not None and route.channel.message is not None:
        content = {codec.JSON: {"schema": _reference(route.channel.message)}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.kind is Kind.REQUEST:
        operation["description"] = (
            "With `wait_seconds` the answer waits with the request. With `Prefer: wait=N` it comes after N seconds at "
            "the latest, with the place in the queue (202): send the same body again with the `request_id` of the "
            "answer, within 30 seconds, to keep the place. With `Accept: text/event-stream` the places come as events "
            "`queued`, and at last `assignment`, `rejection` or `error`. A request without a `request_id` is withdrawn "
            "when the connection ends."
        )
        operation["parameters"] = [
            {
                "name": "Prefer",
                "in": "header",
                "description": "`wait=30`: answer after 30 seconds at the latest.",
                "schema": {"type": "string", "maxLength": 64},
            }
        ]
    elif route.kind is Kind.QUERY:
        operation["description"] = (
            "The answer has the form that `format` names. Without `limit` it has all rows. If it ends without its last "
            "chunk, the query has failed. The query is cancelled when the connection ends."
        )
    elif route.kind is Kind.EVENTS:
        operation["description"] = (
            "Server-sent events, until the connection ends. Events during an outage of the bus do not come again."
        )
    return operation


def _success(route: Route) -> dict[str, Any]:
    match route.kind:
        case Kind.EVENTS:
            assert route.channel is not None
            assert route.channel.message is not None
            name = route.channel.message.__name__
            return _response(f"Events; `data` of each is a {name}.", {EVENT_STREAM: {"schema": {"type": "string"}}})
        case Kind.LOGS:
            return _response("Bytes, as they were printed.", {"text/plain": {"schema": {"type": "string"}}})
        case Kind.QUERY:
            assert route.channel is not None
            text: dict[str, Any] = {"schema": {"type": "string"}}
            content = {
                codec.JSON: {"schema": _reference(route.channel.replies[0])},
                "text/csv": text,
                "application/vnd.apache.arrow.stream": {},
                codec.MSGPACK: {},
            }
            found = _response("The rows.", content)
            found["headers"]["Corral-End"] = {
                "description": "Outcome, where the answer is one message of the bus.",
                "content": {codec.JSON: {"schema": _reference(QueryEnd)}},
            }
            return found
        case Kind.REQUEST:
            content = {codec.JSON: {"schema": _reference(Assignment)}, EVENT_STREAM: {"schema": {"type": "string"}}}
            return _response("It is granted.", content)
        case Kind.MESSAGE:
            assert route.channel is not None
            return _response("Done.", {codec.JSON: {"schema": _any_of(_good(route.channel, route.name))}})


def _failures(route: Route) -> dict[str, Any]:
    listed = route.method == "GET"
    without = {"408", "415"} if listed else set[str]()
    found: dict[str, Any] = {
        status: {"$ref": f"#/components/responses/Error{status}"} for status in _ERRORS if status not in without
    }
    about = _ABOUT_ONE if route.kind is not Kind.EVENTS else {}
    found |= {status: {"$ref": f"#/components/responses/Error{status}"} for status in about}
    if route.kind is Kind.QUERY or route.name == "query_cancel":
        found["499"] = _response("It was cancelled.", {codec.JSON: {"schema": _reference(Error)}})
    if route.kind is Kind.REQUEST:
        found["202"] = _response("It waits in the queue.", {codec.JSON: {"schema": _reference(Queue)}})
        found["202"]["headers"] |= _retry_after()
    if route.channel is not None and Rejection in route.channel.replies and route.name != "withdraw":
        text = "It is rejected, with the reasons; or the state of what it is about does not allow it."
        found[str(REJECTED)] = _response(text, {codec.JSON: {"schema": _any_of([Rejection, Error])}})
    return dict(sorted(found.items()))


def _good(channel: Channel, name: str) -> list[Message]:
    return [each for each in channel.replies if each is not Error and (each is not Rejection or name == "withdraw")]


def _response(text: str, content: dict[str, Any]) -> dict[str, Any]:
    warnings = {
        "description": "JSON list of what was ignored in the request.",
        "schema": {"type": "string"},
    }
    return {"description": text, "headers": {codec.WARNINGS_HEADER: warnings}, "content": content}


def _retry_after() -> dict[str, Any]:
    return {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}


def _parameters(type: Message) -> list[dict[str, Any]]:
    """Parameters of a URL for the fields of a message."""
    _, found = msgspec.json.schema_components([type], ref_template="#/components/schemas/{name}")
    properties: dict[str, Any] = found[type.__name__].get("properties", {})
    described = json_schema.attributes(type)
    parameters: list[dict[str, Any]] = []
    for field in msgspec.structs.fields(type):
        schema = _of_parameter(properties[field.encode_name], found)
        json_schema.as_others_read(schema)
        parameter: dict[str, Any] = {
            "name": field.encode_name,
            "in": "query",
            "description": described.get(field.name, ""),
            "schema": schema,
        }
        if field.required:
            parameter["required"] = True
        if is_list(field.type):
            parameter |= {"style": "form", "explode": True}
        parameters.append(parameter)
    return parameters


def _of_parameter(schema: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    """The schema of a parameter: whole, and without null, which a URL does not have."""
    if reference := schema.get("$ref"):
        return {key: value for key, value in components[reference.rpartition("/")[2]].items() if key != "title"}
    if options := schema.get("anyOf"):
        kept = [_of_parameter(each, components) for each in options if each.get("type") != "null"]
        return kept[0] if len(kept) == 1 else {"anyOf": kept}
    if "items" in schema:
        return {**schema, "items": _of_parameter(schema["items"], components)}
    return dict(schema)


def _reference(message: Message) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{message.__name__}"}


def _any_of(messages: list[Message]) -> dict[str, Any]:
    return _reference(messages[0]) if len(messages) == 1 else {"anyOf": [_reference(each) for each in messages]}
