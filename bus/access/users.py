"""Users of the bus, and the subjects that each of them may use."""

from __future__ import annotations

from msgspec import Struct

from ..credentials import ANY_OWNER
from .matrix import MATRIX
from .roles import Access, Role, Verb


class User(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user of the bus.

    Attributes:
        name: letters, digits, `-` and `_`; also in its inbox and its files' names.
        role: see `Role`.
        key: public NKey.
        owner: name that it makes requests under; `*` for any; empty for roles that make none.
        hosts: that a collector or a runner speaks for; `*` for any.
        follows_leases: of a collector of simulated GPUs, whose numbers obey leases.
        serves: of an exporter, a dashboard or a gateway, which answer health checks. The server lets it answer each
            request once.
        group: group of its owner (`schemas/work/groups.py`), which `corral group apply` can take over; empty for none.
        created: when, RFC 3339.
        expires: when it ends, RFC 3339, for a login that lasts for a time; empty for a user that stays.
    """

    name: str
    role: Role
    key: str
    owner: str = ""
    hosts: tuple[str, ...] = ()
    follows_leases: bool = False
    serves: bool = False
    group: str = ""
    created: str = ""
    expires: str = ""

    @property
    def inbox(self) -> str:
        """Prefix of the reply subjects of its requests."""
        return f"_INBOX.{self.name}"


def allowed(user: User, verb: Verb) -> list[str]:
    """Subjects that a user may use with a verb; only `>` if that is among them."""
    found: dict[str, None] = {}
    for access in MATRIX:
        if access.verb is verb and user.role in access.roles and _concerns(access, user):
            for subject in access.subjects:
                found.update(dict.fromkeys(_filled(subject, user)))
    return [">"] if ">" in found else list(found)


def _concerns(access: Access, user: User) -> bool:
    trusted = user.serves or user.owner == ANY_OWNER
    return (
        (user.follows_leases or not access.follows_leases)
        and (user.serves or not access.serves)
        and (trusted or not access.speaks_for_others)
    )


def _filled(subject: str, user: User) -> list[str]:
    if "{host}" in subject:
        return [subject.replace("{host}", host) for host in user.hosts]
    if "{owner}" in subject:
        return [subject.replace("{owner}", ">" if user.owner == ANY_OWNER else user.owner)] if user.owner else []
    # A user that may make requests under any name, as a dashboard does for its logged-in users, may sign with any.
    subject = subject.replace("{operator}", ">" if user.owner == ANY_OWNER else user.name)
    return [subject.replace("{user}", user.name)]


def anyone(subject: str) -> str:
    """Replace the placeholders of a row's subject with wildcards, as an account exports it.

    Owners and operators become `>`, since they may contain dots.
    """
    for name, wildcard in (("{owner}", ">"), ("{operator}", ">"), ("{user}", "*"), ("{host}", "*")):
        subject = subject.replace(name, wildcard)
    return subject
