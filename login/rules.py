"""Rules for people who log in through an OpenID Connect provider: from their claims to owner, role and group.

The rules are a TOML file:

    issuer = "https://id.example/realms/lab"
    client_id = "corral"
    hours = 12

    [roles]
    gpu-operators = "operator"
    "*" = "requester"

    [groups]
    vision-team = "lab/vision"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, cast
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from ..bus.access.roles import Role
from ..bus.addresses import is_loopback
from ..schemas.requests import OwnerName
from ..schemas.values.error_words import in_words
from ..schemas.work.groups import GroupName

ANYBODY: Final = "*"
"""Key of the role of everybody whom the provider lets in."""
ROLES: Final = (Role.VIEWER, Role.REQUESTER, Role.OPERATOR)
"""Roles that a person can have, those with fewer permissions first."""


class RulesError(ValueError):
    """The rules can't be read or contradict themselves; the message says what to do."""


class LoginRefused(Exception):
    """Nobody with these claims may log in; the message, for that person, says why and what to do."""


class Rules(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Provider, and rules for its claims.

    Attributes:
        issuer: URL of the provider, as it names itself.
        client_id: of Corral at the provider.
        client_secret_file: file with the client's secret; empty for a public client.
        scopes: that are asked for.
        owner_claim: claim with the name that devices are requested under. It must be one that the provider lets
            nobody choose or change.
        groups_claim: claim with the person's groups at the provider: a list, or one name. Dots lead into objects:
            `realm_access.roles`.
        device_authorization_endpoint: URL for providers that support the device flow without naming it.
        hours: time for which a login lasts.
        roles: role by the provider's group; `*` is everybody. The one with the most permissions counts. Without any,
            everybody is a requester.
        groups: group of the fleet by the provider's group. The first in the file counts.
    """

    issuer: str
    client_id: str
    client_secret_file: str = ""
    scopes: list[str] = msgspec.field(default_factory=lambda: ["openid", "profile", "email"])
    owner_claim: str = "preferred_username"
    groups_claim: str = "groups"
    device_authorization_endpoint: str = ""
    hours: Annotated[float, Meta(ge=0.01, le=24 * 31)] = 12.0
    roles: dict[str, Role] = msgspec.field(default_factory=lambda: {ANYBODY: Role.REQUESTER})
    groups: dict[str, GroupName] = {}


class Person(Struct, frozen=True, kw_only=True):
    """Somebody who has logged in.

    Attributes:
        owner: name that devices are requested under.
        role: role on the bus.
        group: group of the fleet; empty for none.
    """

    owner: str
    role: Role
    group: str = ""


def read_rules(path: Path) -> Rules:
    """Read rules from a TOML file.

    Raises:
        RulesError: it is missing or invalid.
    """
    try:
        found = msgspec.toml.decode(path.expanduser().read_bytes(), type=Rules)
    except OSError as error:
        raise RulesError(f"{path} can't be read: {error.strerror}") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise RulesError(f"{path} is invalid: {in_words(str(error))}") from None
    check_url(f"{path}: issuer", found.issuer)
    if found.device_authorization_endpoint:
        check_url(f"{path}: device_authorization_endpoint", found.device_authorization_endpoint)
    if "openid" not in found.scopes:
        raise RulesError(f'{path}: scopes must have "openid", which asks for an identity')
    for name, role in found.roles.items():
        if role not in ROLES:
            raise RulesError(f"{path}: roles: {name!r} is {role}, and people can be {', '.join(ROLES)}")
    return found


def check_url(what: str, url: str) -> None:
    """Refuse a URL that others on the network could answer.

    Raises:
        RulesError: it is not HTTPS, unless it is on this machine.
    """
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme != "http" or not is_loopback(parts.hostname or ""):
        raise RulesError(f"{what} is {url!r}: use an https:// URL")


def person(claims: Mapping[str, Any], rules: Rules) -> Person:
    """Person that claims are of.

    Args:
        claims: of the provider, verified.
        rules: the rules.

    Raises:
        LoginRefused: the claims lack a usable name, or give no role.
    """
    theirs = groups_of(claims, rules)
    roles = [role for name, role in rules.roles.items() if name == ANYBODY or name in theirs]
    if not roles:
        had = f"you are in {', '.join(sorted(theirs)[:8])}" if theirs else f"there is no claim {rules.groups_claim!r}"
        raise LoginRefused(
            f"none of your groups at {rules.issuer} has a role in Corral ({had}): ask its operator for one"
        )
    group = next((group for name, group in rules.groups.items() if name in theirs), "")
    return Person(owner=_owner(claims, rules), role=max(roles, key=ROLES.index), group=group)


def groups_of(claims: Mapping[str, Any], rules: Rules) -> set[str]:
    """Names of somebody's groups at the provider; empty if the claim is missing or of another form."""
    value: Any = claims
    if rules.groups_claim in claims:
        value = claims[rules.groups_claim]
    else:
        for step in rules.groups_claim.split("."):
            value = cast("Mapping[str, Any]", value).get(step) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        return {value}
    if not isinstance(value, Sequence):
        return set()
    return {name for name in cast("Sequence[Any]", value) if isinstance(name, str)}


def _owner(claims: Mapping[str, Any], rules: Rules) -> str:
    name = claims.get(rules.owner_claim)
    if not isinstance(name, str) or not name:
        raise LoginRefused(
            f"{rules.issuer} does not say your {rules.owner_claim}: the operator of Corral can name another "
            "owner_claim, or ask for a scope that has it"
        )
    if rules.owner_claim == "email" and claims.get("email_verified") is not True:
        raise LoginRefused(f"{rules.issuer} has not verified your e-mail address {name}: verify it there first")
    try:
        msgspec.convert(name, OwnerName)
    except msgspec.ValidationError:
        raise LoginRefused(
            f"your {rules.owner_claim} is {name[:64]!r}, which can't be the name of an owner: letters, digits and "
            "_ @ . : / + - only. The operator of Corral can name another owner_claim"
        ) from None
    if name.endswith(".") or ".." in name:
        raise LoginRefused(f"your {rules.owner_claim} is {name[:64]!r}, with an empty part between dots")
    return name
