"""Bytes to messages and back. Every refusal names the path of the field that is wrong."""

from __future__ import annotations

import difflib
import re
from typing import Any, Final, TypeVar, cast

import msgspec

T = TypeVar("T")

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
CONTENT_TYPE_HEADER: Final = "Content-Type"

_to_msgpack = msgspec.msgpack.Encoder()
_to_json = msgspec.json.Encoder()
_msgpack_decoders: dict[object, msgspec.msgpack.Decoder[object]] = {}
_json_decoders: dict[object, msgspec.json.Decoder[object]] = {}


class DecodeError(ValueError):
    """A message that is not what its subject promises.

    Attributes:
        code: `undecodable` for bytes that are no JSON or MessagePack, `invalid` for a wrong type, value or field.
        field: path of the field at fault, such as `$.gpus`; empty if none.
    """

    def __init__(self, message: str, code: str, field: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.field = field


def encode(message: object, content_type: str = MSGPACK) -> bytes:
    """Encode a message; MessagePack unless JSON is asked for."""
    return _to_json.encode(message) if content_type == JSON else _to_msgpack.encode(message)


def decode(payload: bytes, type: type[T], content_type: str = MSGPACK) -> T:
    """Decode and check a message.

    Raises:
        DecodeError: the bytes are not that type, with the path of the field.
    """
    if content_type == JSON:
        decoder = _json_decoders.get(type)
        if decoder is None:
            decoder = _json_decoders[type] = msgspec.json.Decoder(type)
    else:
        decoder = _msgpack_decoders.get(type)
        if decoder is None:
            decoder = _msgpack_decoders[type] = msgspec.msgpack.Decoder(type)
    try:
        return decoder.decode(payload)  # pyright: ignore[reportReturnType]
    except msgspec.ValidationError as error:
        raise DecodeError(str(error), "invalid", _path(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DecodeError(str(error), "undecodable") from None
    except RecursionError:
        raise DecodeError("nested too deep", "undecodable") from None


def decode_request(payload: bytes, type: type[T], content_type: str = JSON) -> tuple[T, list[str]]:
    """Decode a request that may come from a newer client, or from someone who mistyped.

    A field that this version does not know is ignored and named in a warning, unless it is all but a field that it
    does know: a misspelt limit that was silently left out would grant what nobody asked for.

    Returns:
        The request, and one warning for each field that was ignored.

    Raises:
        DecodeError: as `decode`, or a field that looks like a misspelt one.
    """
    warnings: list[str] = []
    while True:
        try:
            return decode(payload, type, content_type), warnings
        except DecodeError as error:
            unknown = _UNKNOWN_FIELD.match(str(error))
            if unknown is None:
                raise
            name, path = unknown[1], error.field or "$"
            where = f"{path}.{name}"
            close = difflib.get_close_matches(name, sorted(_field_names(type)), 1, 0.75)
            if close:
                raise DecodeError(
                    f"There is no field `{name}`: did you mean `{close[0]}`? - at `{where}`", "invalid", where
                ) from None
            # What stands in an unknown field was not looked at until now.
            tree = decode(payload, cast("type[Any]", object), content_type)
            if len(warnings) >= _MOST_UNKNOWN or not _drop(tree, _PATH_STEP.findall(path), name):
                raise
            warnings.append(f"{where} is not known to this version and was ignored")
            payload = encode(tree, content_type)


_UNKNOWN_FIELD: Final = re.compile(r"Object contains unknown field `([^`]*)`")
_PATH_STEP: Final = re.compile(r"\.[^.\[]+|\[[0-9.]+\]")
_MOST_UNKNOWN: Final = 16
"""Each costs one more decoding, so that a request made of nothing else is refused."""


def _field_names(type: Any) -> set[str]:
    """The names of all fields of a struct and of the structs within it."""
    _, components = msgspec.json.schema_components([type])
    return {name for schema in components.values() for name in schema.get("properties", {})}


def _drop(node: Any, path: list[str], name: str) -> int:
    """Take a field away at a path in msgspec's notation, from every entry where the path runs through a list or map.

    Returns:
        How many were taken away.
    """
    if path and path[0].startswith("["):
        entries = cast("list[Any]", list(node.values()) if isinstance(node, dict) else node)
        return sum(_drop(entry, path[1:], name) for entry in entries)
    if not isinstance(node, dict):
        return 0
    fields = cast("dict[str, Any]", node)
    if path:
        return _drop(fields.get(path[0][1:]), path[1:], name)
    if name not in fields:
        return 0
    del fields[name]
    return 1


def content_type(headers: dict[str, str] | None) -> str:
    """The content type that a message's headers name; JSON where they name none.

    Raises:
        DecodeError: a type that Corral does not speak.
    """
    named = (headers or {}).get(CONTENT_TYPE_HEADER, JSON).split(";")[0].strip().lower()
    if named in (JSON, ""):
        return JSON
    if named in (MSGPACK, "application/x-msgpack", "application/vnd.msgpack"):
        return MSGPACK
    raise DecodeError(f"Content-Type {named!r} is not known: send {JSON} or {MSGPACK}", "invalid")


def _path(message: str) -> str:
    """msgspec ends a refusal on «- at `$.path`»."""
    _, _, rest = message.rpartition(" - at `")
    return rest[:-1] if rest.endswith("`") and message != rest else ""
