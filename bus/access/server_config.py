"""Render the NATS server's configuration: accounts, users and permissions, from the table of roles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from ...schemas import subjects
from .matrix import MATRIX
from .roles import ACCOUNTS, Access, Account, Verb
from .users import User, allowed, anyone

_EDGES: Final = (Account.HOSTS, Account.PEOPLE)
_ANSWERS: Final = 'allow_responses: { max: 1, expires: "10s" }'
"""Response permission of users with `serves`. The server tracks each open reply subject: too many for a planner."""


class Tls(Struct, frozen=True, kw_only=True):
    """The server's certificate.

    Attributes:
        certificate: path of it.
        key: path of its key.
        ca: path of the CA's certificate.
        mutual: clients must show a certificate of that CA, too.
    """

    certificate: Path
    key: Path
    ca: Path
    mutual: bool = False


def render(users: Iterable[User], system_key: str, tls: Tls | None = None) -> str:
    """Render the part of `nats-server.conf` with accounts, users and permissions, for the main file to include.

    Args:
        users: of Corral.
        system_key: public NKey of the one user of the system account.
        tls: None for a server without.
    """
    everybody = sorted(users, key=lambda user: user.name)
    lines = [
        "# Made by `corral auth`: what is written here by hand is lost with its next change.",
        *(_tls(tls) if tls else ()),
        "accounts {",
        f"  {Account.CORE} {{",
        "    jetstream: enabled",
        *_users(user for user in everybody if ACCOUNTS[user.role] is Account.CORE),
        *_list("exports", _exports(Account.CORE)),
        "  }",
    ]
    for account in _EDGES:
        lines += [
            f"  {account} {{",
            *_users(user for user in everybody if ACCOUNTS[user.role] is account),
            *_list("exports", _exports(account)),
            *_list("imports", _imports(account)),
            "  }",
        ]
    lines += ["  SYS {", *_list("users", [f"{{ nkey: {system_key} }}"]), "  }", "}", "system_account: SYS", ""]
    return "\n".join(lines)


def _tls(tls: Tls) -> list[str]:
    return [
        "tls {",
        f"  cert_file: {_text(str(tls.certificate))}",
        f"  key_file: {_text(str(tls.key))}",
        f"  ca_file: {_text(str(tls.ca))}",
        f"  verify: {'true' if tls.mutual else 'false'}",
        '  min_version: "1.3"',
        "}",
    ]


def _users(users: Iterable[User]) -> list[str]:
    entries = [
        f"# {user.name}: {user.role}\n"
        f"      {{ nkey: {user.key}, permissions: {{\n"
        f"        publish: {_only(allowed(user, Verb.PUBLISH))}\n"
        f"        subscribe: {_only(allowed(user, Verb.SUBSCRIBE))}\n"
        + (f"        {_ANSWERS}\n" if user.serves else "")
        + "      } }"
        for user in users
    ]
    return _list("users", entries)


def _crossing(account: Account, other: Account, verb: Verb) -> dict[str, Access]:
    """Map the subjects that users of an account use in another one, with wildcards, to their rows of the matrix."""
    found: dict[str, Access] = {}
    for access in MATRIX:
        edge = account in _EDGES and account is not other and any(ACCOUNTS[role] is account for role in access.roles)
        if edge and access.verb is verb and not access.within and other in access.asked_of:
            for subject in access.subjects:
                found.setdefault(anyone(subject), access)
    return found


def _exports(account: Account) -> list[str]:
    services: dict[str, str] = {}
    streams: dict[str, str] = {}
    for other in _EDGES:
        for subject, access in _crossing(other, account, Verb.PUBLISH).items():
            answers = "stream" if access.many else "singleton"
            exported = subjects.unnamed(subject) if access.renamed else subject
            services.setdefault(
                exported,
                f'{{ service: {_text(exported)}, response: {answers}, threshold: "{access.answer_seconds:.0f}s" }}',
            )
        for subject in _crossing(other, account, Verb.SUBSCRIBE):
            streams.setdefault(subject, f"{{ stream: {_text(subject)} }}")
    return [*services.values(), *streams.values()]


def _imports(account: Account) -> list[str]:
    return [
        f"{{ {kind}: {{ account: {other}, subject: {_text(subjects.unnamed(subject) if access.renamed else subject)} }}"
        + (f", to: {_text(subject)} }}" if access.renamed else " }")
        for other in Account
        for kind, verb in (("service", Verb.PUBLISH), ("stream", Verb.SUBSCRIBE))
        for subject, access in _crossing(account, other, verb).items()
    ]


def _list(name: str, entries: Sequence[str]) -> list[str]:
    return [f"    {name}: [", *(f"      {entry}" for entry in entries), "    ]"]


def _only(subjects: Sequence[str]) -> str:
    """Permission for some subjects alone. A server may take an empty list of them for all."""
    return f"{{ allow: {_texts(subjects)} }}" if subjects else '{ deny: [">"] }'


def _texts(values: Iterable[str]) -> str:
    return "[" + ", ".join(_text(value) for value in values) + "]"


def _text(value: str) -> str:
    return json.dumps(value)
