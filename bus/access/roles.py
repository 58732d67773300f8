"""Roles of users of the bus, and the accounts that they belong to.

Users belong to three NATS accounts. Streams, buckets and services are in the account CORRAL, with the planner and the
processor. Collectors and runners are in CORRAL_HOSTS, people in CORRAL_PEOPLE. These two see only what CORRAL exports
to them.

One account with permissions would not be safe. A server checks the subject that a client publishes on, but not the
reply subject, and JetStream answers there. In one account, a client that may publish a sample could have the
acknowledgement, or a stored message with contents of its choice, written over a lease in the planner's bucket. Across
accounts an answer is routed to the client that asked, and nowhere else.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct


class Role(StrEnum):
    """Role of a user."""

    COLLECTOR = "collector"
    """Publishes the telemetry of its hosts."""
    RUNNER = "runner"
    """Runs the jobs of its hosts."""
    PROCESSOR = "processor"
    """Reads the streams and answers SQL."""
    PLANNER = "planner"
    """Grants devices."""
    NOTIFIER = "notifier"
    """Sends notifications, and keeps the rules for them."""
    REQUESTER = "requester"
    """Requests devices under its own name, and sees the fleet."""
    VIEWER = "viewer"
    """Sees the fleet."""
    OPERATOR = "operator"
    """Sees the fleet, requests devices under its own name, drains, books, evicts, changes groups, takes snapshots."""
    GATEWAY = "gateway"
    """Answers its own health checks. What it does for its callers it does with their credentials."""
    ADMIN = "admin"
    """Manages streams, in an emergency; no part needs it."""


class Account(StrEnum):
    """NATS account that a user belongs to."""

    CORE = "CORRAL"
    HOSTS = "CORRAL_HOSTS"
    PEOPLE = "CORRAL_PEOPLE"


ACCOUNTS: Final[dict[Role, Account]] = {
    Role.COLLECTOR: Account.HOSTS,
    Role.RUNNER: Account.HOSTS,
    Role.PROCESSOR: Account.CORE,
    Role.PLANNER: Account.CORE,
    Role.NOTIFIER: Account.CORE,
    Role.REQUESTER: Account.PEOPLE,
    Role.VIEWER: Account.PEOPLE,
    Role.OPERATOR: Account.PEOPLE,
    Role.GATEWAY: Account.PEOPLE,
    Role.ADMIN: Account.CORE,
}


class Verb(StrEnum):
    """Operation on a subject."""

    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"


class Access(Struct, frozen=True, kw_only=True):
    """Subjects that some roles may use.

    Attributes:
        verb: see `Verb`.
        subjects: `{host}`, `{owner}`, `{operator}` and `{user}` are the user's own; other tokens as NATS has them.
        roles: that may use them.
        what: description for people.
        many: true if the answer may be more than one message.
        answer_seconds: time limit of an answer to a user of another account.
        follows_leases: only for users that follow leases, as simulated GPUs do.
        serves: only for users that are services themselves, as an exporter is.
        speaks_for_others: only for users that are trusted to name the user they ask for: services, and users that may
            make requests under any name.
        within: true if the subjects are not exported to other accounts.
        asked_of: accounts whose services answer.
        renamed: services receive it on another subject (`subjects.unnamed`), and only answer which subject to use.
    """

    verb: Verb
    subjects: tuple[str, ...]
    roles: frozenset[Role]
    what: str
    many: bool = False
    answer_seconds: float = 120.0
    follows_leases: bool = False
    serves: bool = False
    speaks_for_others: bool = False
    within: bool = False
    asked_of: tuple[Account, ...] = (Account.CORE,)
    renamed: bool = False


SERVICES: Final = frozenset({Role.PROCESSOR, Role.PLANNER})
PEOPLE: Final = frozenset({Role.REQUESTER, Role.VIEWER, Role.OPERATOR})
ASKING: Final = frozenset({Role.REQUESTER, Role.OPERATOR})
EVERYBODY: Final = frozenset(Role)
ON_HOSTS: Final = frozenset({Role.COLLECTOR, Role.RUNNER})
"""Roles of users that speak for hosts."""
