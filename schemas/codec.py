"""Encode and decode messages. A validation error names the path of the field that is wrong."""

from __future__ import annotations

import json
import re
from typing import Any, Final, TypeVar, cast

import msgspec
import msgspec.inspect

from .values.choices import with_choices
from .values.error_words import in_words
from .values.misspelt import MAX_NAME, meant
from .values.plain import encodable

T = TypeVar("T")

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
CONTENT_TYPE_HEADER: Final = "Content-Type"
WARNINGS_HEADER: Final = "Corral-Warnings"
"""Header of an answer: a JSON list of what was ignored in the request."""
LINE_HEADER: Final = "Corral-Line"
"""Header of a request that waits: identifies the client, so that the planner recognizes it when it sends the same
request id again."""
FORWARDED_HEADER: Final = "Corral-Forwarded"
"""Header of a message that a planner which no longer leads forwards to the leader: the id of that planner."""

_to_msgpack = msgspec.msgpack.Encoder(enc_hook=encodable)
_to_json = msgspec.json.Encoder(enc_hook=encodable)
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
    """Decode and validate a message. A whole number may be written as 1.0, as in JSON Schema; also in MessagePack.

    Raises:
        DecodeError: the bytes are not that type; it has the path of the field.
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
        if _WHOLE_WANTED.match(str(error)):
            whole = _with_whole_numbers(payload, content_type)
            if whole is not None:
                return decode(whole, type, content_type)
        # JSON and MessagePack both call it null.
        text = with_choices(in_words(str(error).replace("got `None`", "got `null`")), type)
        raise DecodeError(text, "invalid", _path(text)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DecodeError(str(error), "undecodable") from None
    except RecursionError:
        raise DecodeError("nested too deep", "undecodable") from None


_WHOLE_WANTED: Final = re.compile(r"Expected `int\b[^`]*`, got `float`")
_LARGEST_WHOLE: Final = 2.0**63
"""No field holds a larger whole number, and few larger numbers are exact as floats."""


def _with_whole_numbers(payload: bytes, content_type: str) -> bytes | None:
    """Encode a message again with each whole float as an integer; None if it has none or can't be decoded.

    A field that takes any number accepts integers, too.
    """
    found = 0

    def walk(node: Any) -> Any:
        nonlocal found
        if isinstance(node, float):
            if not node.is_integer() or abs(node) >= _LARGEST_WHOLE:
                return node
            found += 1
            return int(node)
        if isinstance(node, dict):
            return {key: walk(value) for key, value in cast("dict[Any, Any]", node).items()}
        if isinstance(node, list):
            return [walk(value) for value in cast("list[Any]", node)]
        return node

    try:
        tree: Any = msgspec.json.decode(payload) if content_type == JSON else msgspec.msgpack.decode(payload)
        tree = walk(tree)
        return encode(tree, content_type) if found else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError):
        return None


def refuse_empty(payload: bytes) -> None:
    """Refuse a message without a body: it asks for nothing, and may come from the NATS server itself.

    Raises:
        DecodeError: it is empty.
    """
    if not payload:
        raise DecodeError("The message is empty: send an object with what you ask for", "invalid")


def decode_request(payload: bytes, type: type[T], content_type: str = JSON) -> tuple[T, list[str]]:
    """Decode a request that may come from a newer client, or that may hold misspelt fields.

    A field that this version does not know is ignored and named in a warning. If it looks like a known field it is
    refused instead: to ignore a misspelt limit could grant more than was asked for.

    Returns:
        The request, and one warning for each field that was ignored.

    Raises:
        DecodeError: as `decode`; or the message is empty, has a field that looks misspelt, has more than
            `_MOST_UNKNOWN` unknown fields, or is an answer of the NATS server.
    """
    refuse_empty(payload)
    try:
        return decode(payload, type, content_type), []
    except DecodeError as error:
        if not str(error).startswith(_UNKNOWN_FIELD):
            raise
        unknown = error
    # The values of unknown fields have not been decoded until now.
    tree = decode(payload, cast("type[Any]", object), content_type)
    if isinstance(tree, dict) and str(cast("dict[str, Any]", tree).get("type", "")).startswith(_SERVERS_OWN):
        raise unknown  # an answer of the NATS server, which a client has redirected to this subject
    found: dict[tuple[_Known, str], str] = {}
    known = _known(msgspec.inspect.type_info(type))
    if known is None or not _drop_unknown(tree, known, "$", found):
        raise unknown
    for (where_known, name), path in found.items():
        close = _meant(name, where_known, known)
        if close:
            where = f"{path}.{name}"
            raise DecodeError(f"There is no field `{name}`: did you mean `{close}`? - at `{where}`", "invalid", where)
    warnings = [
        f"{path}.{name[:MAX_NAME]} is not known to this version and was ignored" for (_, name), path in found.items()
    ]
    return decode(encode_again(tree, content_type), type, content_type), warnings


def warnings_header(warnings: list[str]) -> str:
    """Encode warnings as the value of a header, which is one line of ASCII."""
    return json.dumps(warnings)


def encode_again(tree: object, content_type: str) -> bytes:
    """Encode a decoded message again, in its own content type.

    Raises:
        DecodeError: it holds a whole number that is too large for any field.
    """
    try:
        return encode(tree, content_type)
    except OverflowError as error:
        raise DecodeError(f"A whole number is too large: {error}", "invalid") from None


_UNKNOWN_FIELD: Final = "Object contains unknown field "
_SERVERS_OWN: Final = "io.nats."
"""Prefix of the `type` in answers of JetStream and of NATS services."""
_MOST_UNKNOWN: Final = 16
"""Unknown field names that one request may have; a request with more is refused."""


class _Known:
    """Known fields of a type: those of a struct, or those of the entries of a list or map.

    Attributes:
        fields: field names of a struct that forbids others; None for a struct that allows any, and for other types.
        inner: fields with a struct somewhere in them, each with the known fields there.
        each: the known fields of the entries of a list or map; None for a struct.
    """

    __slots__ = ("each", "fields", "inner")

    def __init__(self, each: _Known | None = None) -> None:
        self.fields: frozenset[str] | None = None
        self.inner: dict[str, _Known] = {}
        self.each = each


_known_structs: Final[dict[type[Any], _Known]] = {}


def _known(info: msgspec.inspect.Type) -> _Known | None:
    """Find the known fields of a type; None where it holds no struct, or is a union of several."""
    if isinstance(info, msgspec.inspect.Metadata):
        return _known(info.type)
    if isinstance(info, msgspec.inspect.StructType):
        return _known_structs.get(info.cls) or _known_struct(info)
    if isinstance(info, msgspec.inspect.UnionType):
        # Of several structs, which one is meant is decided later, and what is unknown is refused then.
        found = [known for each in info.types if (known := _known(each)) is not None]
        return found[0] if len(found) == 1 else None
    if isinstance(info, msgspec.inspect.DictType):
        each = _known(info.value_type)
    elif isinstance(info, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
        each = _known(info.item_type)
    else:
        return None
    return None if each is None else _Known(each)


def _known_struct(info: msgspec.inspect.StructType) -> _Known:
    known = _known_structs[info.cls] = _Known()
    if info.forbid_unknown_fields:
        own = {field.encode_name for field in info.fields}
        known.fields = frozenset(own if info.tag_field is None else {*own, info.tag_field})
    for field in info.fields:
        inner = _known(field.type)
        if inner is not None:
            known.inner[field.encode_name] = inner
    return known


def _drop_unknown(node: Any, known: _Known, path: str, found: dict[tuple[_Known, str], str]) -> bool:
    """Remove unknown fields, in one pass.

    Args:
        node: part of a decoded message; changed in place.
        known: the known fields of its type.
        path: path of the node.
        found: each name that was removed, with the path of the first struct that had it.

    Returns:
        False if there are more than `_MOST_UNKNOWN` unknown names.
    """
    if known.each is not None:
        if isinstance(node, dict):
            entries = ((f"{path}[...]", entry) for entry in cast("dict[Any, Any]", node).values())
        elif isinstance(node, list):
            entries = ((f"{path}[{at}]", entry) for at, entry in enumerate(cast("list[Any]", node)))
        else:
            return True
        return all(_drop_unknown(entry, known.each, where, found) for where, entry in entries)
    if not isinstance(node, dict):
        return True
    fields = cast("dict[Any, Any]", node)
    if known.fields is not None and not fields.keys() <= known.fields:
        for name in [name for name in fields if name not in known.fields]:
            del fields[name]
            found.setdefault((known, str(name)), path)
            if len(found) > _MOST_UNKNOWN:
                return False
    return all(
        _drop_unknown(fields[name], inner, f"{path}.{name}", found)
        for name, inner in known.inner.items()
        if name in fields
    )


def _meant(name: str, here: _Known, whole: _Known) -> str:
    """Find the field that was probably meant: in the same struct, else elsewhere in the message, with its path.

    Empty if there is none.
    """
    if near := meant(name, here.fields or ()):
        return near
    elsewhere = _fields_by_path(whole)
    found = meant(name, [path.rpartition(".")[2] for path in elsewhere])
    return next((path for path in elsewhere if path.rpartition(".")[2] == found), "") if found else ""


def _fields_by_path(known: _Known, path: str = "", inside: tuple[_Known, ...] = ()) -> list[str]:
    """Paths of the fields of a struct and of the structs within it, such as `distribution.items`."""
    if known in inside:
        return []
    if known.each is not None:
        return _fields_by_path(known.each, path, (*inside, known))
    found = [f"{path}{name}" for name in sorted(known.fields or ())]
    for name, inner in known.inner.items():
        found += _fields_by_path(inner, f"{path}{name}.", (*inside, known))
    return found


def content_type(headers: dict[str, str] | None) -> str:
    """Content type that a message's headers name; JSON where they name none.

    Raises:
        DecodeError: a content type that Corral does not support.
    """
    if not headers:
        return JSON
    given = headers
    named = given.get(CONTENT_TYPE_HEADER)
    if named is None:
        # As in HTTP, `content-type` is the same.
        named = next((text for name, text in given.items() if name.lower() == CONTENT_TYPE_HEADER.lower()), JSON)
    named = named.split(";")[0].strip().lower()
    if named in (JSON, ""):
        return JSON
    if named in (MSGPACK, "application/x-msgpack", "application/vnd.msgpack"):
        return MSGPACK
    raise DecodeError(f"Content-Type {named!r} is not known: send {JSON} or {MSGPACK}", "invalid")


_MISSING: Final = re.compile(r"Object missing required field `([^`]*)`(?: - at `(.*)`)?\Z")


def _path(message: str) -> str:
    """Path of the field in an error of msgspec that ends in «- at `$.path`» or «- at `key` in `$.path`»; else empty."""
    if missing := _MISSING.match(message):
        return f"{missing[2] or '$'}.{missing[1]}"
    _, _, rest = message.rpartition(" - at `")
    return rest[:-1].removeprefix("key` in `") if rest.endswith("`") and message != rest else ""
