"""Bearer tokens for the HTTP gateway: credentials of a user in one word.

A token is the prefix `corral_` and, as base64url without padding, a JSON object with the user's seed and the names that
stand in its subjects. It has exactly the rights of the credentials that it was made of, and ends with them. The names
only save the gateway from asking: the server knows the key alone, and refuses subjects with other names.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from ...schemas.values import names
from ..credentials import ANY_OWNER, Identity

PREFIX: Final = "corral_"
MAX_TOKEN: Final = 1024
"""Length that no token exceeds, in characters."""
_TEXT: Final = re.compile(PREFIX + r"[A-Za-z0-9_-]+")

_User = Annotated[str, Meta(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$(?!\n)")]
_Seed = Annotated[str, Meta(pattern=r"^SU[A-Z2-7]{56}$(?!\n)")]


class TokenError(ValueError):
    """Text that is no token; the message never repeats it."""


class _Content(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    user: _User
    role: Annotated[str, Meta(max_length=32, pattern=r"^[a-z]*$(?!\n)")] = ""
    owner: Annotated[str, Meta(max_length=128)] = ""
    seed: _Seed


def token_of(identity: Identity, owner: str = "") -> str:
    """Make the token of a user.

    Args:
        identity: as its credentials file has it.
        owner: name that requests of the token are made under, for credentials for any owner; empty for that of the
            credentials.

    Raises:
        TokenError: the credentials have no seed or no user, or they are for another owner.
    """
    if not identity.seed or not identity.user:
        raise TokenError(f"{identity.file or 'these credentials'}: only files of `corral auth` can become a token")
    if owner and identity.owner not in (ANY_OWNER, owner):
        raise TokenError(f"{identity.user} makes requests for the owner {identity.owner or '(none)'}, not for {owner}")
    content = _Content(user=identity.user, role=identity.role, owner=owner or identity.owner, seed=identity.seed)
    text = PREFIX + base64.urlsafe_b64encode(msgspec.json.encode(content)).rstrip(b"=").decode()
    try:
        identity_of_token(text)
    except TokenError:
        raise TokenError(f"{owner or identity.file}: a name in it can't stand in a token") from None
    return text


def identity_of_token(text: str) -> Identity:
    """Read a token. Whether the server knows its key is another question.

    Raises:
        TokenError: it is none, or is damaged.
    """
    if len(text) > MAX_TOKEN or not _TEXT.fullmatch(text):
        raise TokenError("it is no token of `corral auth token`")
    word = text.removeprefix(PREFIX)
    try:
        content = msgspec.json.decode(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)), type=_Content)
    except (binascii.Error, ValueError, RecursionError):
        raise TokenError("it is damaged: copy it again, or make another one with `corral auth token`") from None
    if content.owner not in ("", ANY_OWNER) and not _fits_subject(content.owner):
        raise TokenError("the owner in it can't stand in a subject")
    if not _is_key(content.seed):
        raise TokenError("its key is damaged: copy it again, or make another one with `corral auth token`")
    return Identity(
        user=content.user,
        role=content.role,
        owner=content.owner,
        inbox=f"_INBOX.{content.user}",
        seed=content.seed,
    )


def _fits_subject(owner: str) -> bool:
    """True if an owner can stand at the end of a subject: no wildcards, no empty tokens."""
    return re.match(names.OWNER, owner) is not None and not owner.endswith(".") and ".." not in owner


def _is_key(seed: str) -> bool:
    """True if the checksum of a seed is right, which the library nkeys does not look at."""
    raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
    whole = base64.b32encode(raw).decode().rstrip("=") == seed
    return whole and binascii.crc_hqx(raw[:-2], 0) == int.from_bytes(raw[-2:], "little")
