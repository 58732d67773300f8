"""Moves: leases to preempt, or to shrink, so that whole hosts become free, or a waiting request can start."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from ..requests import Identifier, OwnerName, ShortText, Time


class MovesQuery(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Ask for the fewest leases to preempt so that hosts become free, or a request can start. Nothing is changed.

    Without `free_hosts` and `request_id` it is about the request that is next in the queue.

    Attributes:
        free_hosts: number of hosts that shall be free of leases, those that are free already included.
        hosts: with `free_hosts`: globs over host names; empty allows any.
        models: with `free_hosts`: globs over the names of all devices of a host, case-insensitive; empty allows any.
        request_id: id of the waiting request that shall start.
        owner: owner of that request, where several use the id.
    """

    free_hosts: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    hosts: Annotated[list[ShortText], Meta(max_length=1024)] = []
    models: Annotated[list[ShortText], Meta(max_length=64)] = []
    request_id: Identifier | None = None
    owner: OwnerName | None = None


class Move(Struct, frozen=True, kw_only=True):
    """A lease to preempt, or an elastic one that is asked to give devices back.

    Attributes:
        lease_id: id of the lease.
        owner: owner of the lease.
        name: name of the workload.
        group: group of the owner; empty without groups.
        devices: number of devices that it holds; a share is a part.
        hosts: hosts that it holds something of, sorted.
        since: when its work was last saved, or else when it was granted: what it has done since would be lost if it
            were preempted.
        price_gpu_seconds: that time, multiplied by its devices; 0 if it is asked to give devices back.
        grace_seconds: time that its holder would have after the notice.
        gives_back: uuids of the devices that it is asked to give back; it goes on with the others, and its holder may
            decline. Empty if it is preempted.
    """

    lease_id: str
    owner: str
    name: str = ""
    group: str = ""
    devices: float = 0.0
    hosts: list[str] = []
    since: Time
    price_gpu_seconds: float = 0.0
    grace_seconds: float = 0.0
    gives_back: list[str] = []


class Moves(Struct, frozen=True, kw_only=True, tag="moves", tag_field="type"):
    """The fewest leases to preempt; of equally few, with the fewest to shrink, then with the least price.

    Attributes:
        possible: true if these moves are enough; without any, nothing has to be moved.
        message: gain and price in one sentence, or why it is not possible.
        moves: the leases, the cheapest first.
        price_gpu_seconds: of all together.
        proven: true if no fewer leases would do, and as few for no lower price; false if that was too much to search.
        free_hosts: the hosts that would be free, with those that are already, sorted; empty for a request.
        request_id: id of the request that would start; empty for hosts.
        owner: its owner.
        ahead: number of requests ahead of it in the queue, which may take what comes free.
        warnings: fields of the request that this planner does not know and has ignored.
    """

    possible: bool
    message: str
    moves: list[Move] = []
    price_gpu_seconds: float = 0.0
    proven: bool = True
    free_hosts: list[str] = []
    request_id: str = ""
    owner: str = ""
    ahead: int = 0
    warnings: list[str] = []
