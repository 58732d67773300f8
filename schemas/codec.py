"""Bytes to messages and back. Every refusal names the path of the field that is wrong."""

from __future__ import annotations

import difflib
from typing import Any, Final, TypeVar, cast

import msgspec
import msgspec.inspect

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
    try:
        return decode(payload, type, content_type), []
    except DecodeError as error:
        if not str(error).startswith(_UNKNOWN_FIELD):
            raise
        unknown = error
    # What stands in an unknown field was not looked at until now.
    tree = decode(payload, cast("type[Any]", object), content_type)
    found: dict[tuple[_Known, str], str] = {}
    known = _known(msgspec.inspect.type_info(type))
    if known is None or not _drop_unknown(tree, known, "$", found):
        raise unknown
    names = _field_names(type)
    for (_, name), path in found.items():
        # Longer ones are no slip of the pen, and comparing takes its time.
        close = difflib.get_close_matches(name, names, 1, 0.75) if len(name) <= _LONGEST_NAME else []
        if close:
            where = f"{path}.{name}"
            raise DecodeError(
                f"There is no field `{name}`: did you mean `{close[0]}`? - at `{where}`", "invalid", where
            ) from None
    warnings = [
        f"{path}.{name[:_LONGEST_NAME]} is not known to this version and was ignored"
        for (_, name), path in found.items()
    ]
    return decode(encode(tree, content_type), type, content_type), warnings


_UNKNOWN_FIELD: Final = "Object contains unknown field "
_MOST_UNKNOWN: Final = 16
"""Names that one request may have beside those that are known: one that is made of nothing else is refused."""
_LONGEST_NAME: Final = 64


class _Known:
    """What is known of a type: the fields of a struct, or what the entries of a list or map are.

    Attributes:
        fields: names of a struct that takes no others; None for one that takes any, and for what is no struct.
        inner: fields with a struct somewhere in them.
        each: of the entries.
    """

    __slots__ = ("each", "fields", "inner")

    def __init__(self, each: _Known | None = None) -> None:
        self.fields: frozenset[str] | None = None
        self.inner: dict[str, _Known] = {}
        self.each = each


_known_structs: Final[dict[type[Any], _Known]] = {}


def _known(info: msgspec.inspect.Type) -> _Known | None:
    """What is known of a type; None where there is no struct in it."""
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
    """Take away what is not known, in one pass.

    Args:
        node: changed in place.
        known: of its type.
        path: of the node.
        found: each name that was taken away, with the path of the first struct that had it.

    Returns:
        Whether there are not too many.
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


def _field_names(type: Any) -> list[str]:
    """The names of all fields of a struct and of the structs within it."""
    names = _names.get(type)
    if names is None:
        _, components = msgspec.json.schema_components([type])
        names = _names[type] = sorted({name for schema in components.values() for name in schema.get("properties", {})})
    return names


_names: Final[dict[object, list[str]]] = {}


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
