"""Bytes to messages and back. Every refusal names the path of the field that is wrong."""

from __future__ import annotations

from typing import Final, TypeVar

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
