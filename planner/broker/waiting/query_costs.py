"""Cost estimates of queries, from counts alone: cheap ones are answered at once, expensive ones in a forked copy.

Measured on one core of a server of 2021 and rounded up: an overestimate costs a fork of the process.
"""

from __future__ import annotations

import math
from typing import Final

from ....schemas.operations import DeviceFilter, ExplainRequest, LeaseFilter, QueueFilter
from ....schemas.requests import Distribution, LeaseState, Method
from ...fleet.fleet import Fleet
from ...leases.lifecycle import LeaseTable
from ...work.balance import EXACT_ITEMS, EXACT_NODES

CHEAP_SECONDS: Final = 0.002
"""Time for which a query may block the event loop."""
TURN_SECONDS: Final = 0.02
"""Time for which messages are handled before the event loop runs other tasks."""

_LISTED_DEVICE: Final = 20e-6
_SUMMED_DEVICE: Final = 6e-6
_EXPLAINED_DEVICE: Final = 8e-6
_ADDED_DEVICE: Final = 60e-6
_COMPARED_NAME: Final = 0.5e-6
_RECORD: Final = 1e-6
_LISTED_BYTE: Final = 4e-9
_COUNTED: Final = 2e-6
_STAGED: Final = 20e-6
_PLACE: Final = 0.5e-6
_NODE: Final = 8e-6
_WAITING: Final = 6e-6
_COMPARED_WAITING: Final = 0.1e-6
_LISTED_GROUP: Final = 80e-6
_GROUPED_LEASE: Final = 100e-6
_GROUPED_WAITING: Final = 20e-6


def listing(fleet: Fleet, only: DeviceFilter) -> float:
    """Cost of listing devices, in seconds."""
    return len(fleet.devices) * _LISTED_DEVICE + _filtering(fleet, only)


def summing(fleet: Fleet, only: DeviceFilter) -> float:
    """Cost of aggregates over the fleet, in seconds."""
    return len(fleet.devices) * _SUMMED_DEVICE + _filtering(fleet, only)


def explaining(fleet: Fleet, question: ExplainRequest) -> float:
    """Cost of an explanation, in seconds."""
    added = sum(more.devices for more in question.with_more)
    patterns = len(question.request.hosts)
    work = question.request.distribution
    return (
        (len(fleet.devices) + added) * _EXPLAINED_DEVICE
        + added * _ADDED_DEVICE
        + (len(fleet.hosts) + added) * patterns * _COMPARED_NAME
        + (0.0 if work is None else distributing(work, question.request.gpus))
    )


def distributing(work: Distribution, devices: int) -> float:
    """Cost of distributing work items over devices, in seconds."""
    if work.serve is not None:
        return math.inf
    counted = isinstance(work.items, int)
    items = work.items if isinstance(work.items, int) else len(work.items)
    if work.method is Method.BALANCED and not counted:
        exact = min(EXACT_NODES, max(1, devices) ** items) if items <= EXACT_ITEMS else EXACT_NODES
        return exact * _NODE + items * devices * _PLACE
    if work.method is Method.PIPELINE:
        return items * _STAGED + items * devices * _PLACE
    return items * _COUNTED + (0.0 if counted else items * devices * _PLACE) + devices * _COUNTED


def leases(table: LeaseTable, only: LeaseFilter) -> float:
    """Cost of listing leases, in seconds."""
    if only.lease_id is not None:
        return 0.0
    if only.hosts and only.states == (LeaseState.ACTIVE,):
        return sum(table.count_on(host) for host in only.hosts) * 20 * _RECORD
    size = table.owners.bytes if only.owner is None else table.owners.of(only.owner).bytes
    return len(table) * _RECORD + size * _LISTED_BYTE


def waiting(entries: int, only: QueueFilter) -> float:
    """Cost of listing the queue, in seconds."""
    narrow = only.request_id is not None or only.limit is not None
    listed = min(entries, only.limit or 1) if narrow else entries
    return listed * _WAITING + entries * _COMPARED_WAITING


def groups(number: int, leases: int, entries: int) -> float:
    """Cost of listing groups with their state, in seconds.

    Args:
        number: of groups.
        leases: that have to be counted first.
        entries: requests in the queue.
    """
    return number * _LISTED_GROUP + leases * _GROUPED_LEASE + entries * _GROUPED_WAITING


def windows(devices: int) -> float:
    """Cost of listing booked windows, in seconds.

    Args:
        devices: number of their devices, all together.
    """
    return devices * _LISTED_DEVICE


def _filtering(fleet: Fleet, only: DeviceFilter) -> float:
    per_device = len(only.models) + len(only.devices)
    return (len(fleet.hosts) * len(only.hosts) + len(fleet.devices) * per_device) * _COMPARED_NAME
