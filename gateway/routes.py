"""Paths of the gateway: one for each channel of the bus that is for users. Pure.

`/v1/<name of the channel>` takes the channel's message as JSON with POST. Channels that only list something take the
fields of their message as parameters of a GET.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec
from msgspec import Struct

from ..schemas import codec, subjects
from ..schemas.channels import CHANNELS, Channel, Message
from ..schemas.requests import Identifier, LeaseEventKind, OwnerName

PREFIX: Final = "/v1/"
MAX_PARAMETERS: Final = 2048
_LISTS: Final = frozenset({"leases", "devices", "fleet", "queue", "jobs", "groups", "windows", "history_status"})
"""Channels that only list something."""
_QUERIES: Final = frozenset({"query", "query_cancel"})
_STREAMED: Final = frozenset({"lease_events", "job_events"})


class Kind(StrEnum):
    """Form of the answers of a path."""

    MESSAGE = "message"
    """By the reply to a message."""
    REQUEST = "request"
    """As a message; a request may wait."""
    QUERY = "query"
    """By the rows of a query, as they come."""
    EVENTS = "events"
    """By events as they are published, until the client ends it."""
    LOGS = "logs"
    """By what a task of a job prints."""


class LeaseEventsFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Lease events to send.

    Attributes:
        lease_id: only of this lease.
        kind: only of this kind.
        owner: only of leases of this owner.
    """

    lease_id: Identifier | None = None
    kind: LeaseEventKind | None = None
    owner: OwnerName | None = None


class JobEventsFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Events of jobs to send.

    Attributes:
        job_id: only of this job.
        owner: only of jobs of this owner.
    """

    job_id: Identifier | None = None
    owner: OwnerName | None = None


class LogsFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Output to send: what a task of a job prints on one host.

    Attributes:
        job_id: the job, or a task of an array: `1234`, `1234_7`.
        host: of a task on several hosts.
        follow: go on until the task has ended; false sends what the bus has kept so far.
    """

    job_id: str
    host: str | None = None
    follow: bool = False


class Route(Struct, frozen=True, kw_only=True):
    """A path.

    Attributes:
        path: the whole of it.
        method: of HTTP.
        kind: how it is answered.
        channel: that it stands for; None for `/v1/logs`, which reads a stream.
        parameters: type whose fields are the parameters of a GET; None if it has none.
        summary: one sentence.
    """

    path: str
    method: str
    kind: Kind
    channel: Channel | None
    parameters: Message | None
    summary: str

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.removeprefix(PREFIX)


def _route(channel: Channel) -> Route | None:
    """The path of a channel; None if it has none."""
    filters: dict[str, Message] = {"lease_events": LeaseEventsFilter, "job_events": JobEventsFilter}
    name = channel.name
    kind, method, parameters = Kind.MESSAGE, "POST", None
    if name in _STREAMED:
        kind, method, parameters = Kind.EVENTS, "GET", filters[name]
    elif name in _LISTS:
        method, parameters = "GET", channel.message
    elif name in _QUERIES:
        kind = Kind.QUERY if name == "query" else Kind.MESSAGE
    elif not channel.subject.startswith(f"{subjects.PLAN}.") or channel.publisher != "client":
        return None
    elif name == "request":
        kind = Kind.REQUEST
    return Route(
        path=PREFIX + name,
        method=method,
        kind=kind,
        channel=channel,
        parameters=parameters,
        summary=channel.summary if kind is not Kind.EVENTS else f"{channel.summary.rstrip('.')}, as it happens.",
    )


ROUTES: Final[dict[str, Route]] = {
    **{route.path: route for channel in CHANNELS if (route := _route(channel)) is not None},
    f"{PREFIX}logs": Route(
        path=f"{PREFIX}logs",
        method="GET",
        kind=Kind.LOGS,
        channel=None,
        parameters=LogsFilter,
        summary="What a task of a job prints.",
    ),
}
"""By path."""


def message_of(query_string: bytes, type: Message) -> bytes:
    """A message with the parameters of a URL as its fields, as JSON. The service that gets it checks them.

    A field that is a list is given once for each entry. Values that don't fit stay text, so that the service names
    them in its error.

    Raises:
        DecodeError: they are too many, are no text in UTF-8, or one is given twice that is no list.
    """
    try:
        pairs = parse_qsl(
            query_string.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS
        )
    except UnicodeError:
        raise codec.DecodeError("The parameters are not UTF-8, with % before each byte", "undecodable") from None
    except ValueError:
        raise codec.DecodeError(f"There are more than {MAX_PARAMETERS} parameters", "too_large") from None
    fields = {field.encode_name: field for field in msgspec.structs.fields(type)}
    tree: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields and is_list(fields[name].type):
            tree.setdefault(name, []).append(value)
        elif name in tree:
            raise codec.DecodeError(f"The parameter is given twice - at `$.{name}`", "invalid", f"$.{name}")
        else:
            tree[name] = value
    for name in tree.keys() & fields.keys():
        tree[name] = _converted(tree[name], fields[name].type)
    return codec.encode(tree, codec.JSON)


def is_list(type: Any) -> bool:
    """True if a field holds a list."""
    origin = get_origin(type)
    if hasattr(type, "__metadata__"):
        return is_list(get_args(type)[0])
    return origin in (list, tuple)


def _converted(value: Any, type: Any) -> Any:
    try:
        found = msgspec.convert(value, type, strict=False)
        # A URL has no null: who writes it as text means that text.
        return value if found is None else found
    except (msgspec.ValidationError, ValueError, OverflowError):
        return value
