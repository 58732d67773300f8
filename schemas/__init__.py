"""The contract between the parts: messages, the metric catalog, and the layout of the bus.

Programs import from here what they need beside `corral.client`: the messages that its methods take and return, and the
modules `codec`, `columns` and `subjects` for reading the bus themselves. A name is loaded when it is first used, so
that importing one module of the contract does not import all.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import codec, columns, subjects
    from .metrics import DeviceSample
    from .operations import Addition, DeviceStatus, Explanation, FleetSummary, QueueEntry
    from .query import ProcessorStatus, ResultFormat
    from .requests import (
        Assignment,
        Distribution,
        GpuRange,
        Grant,
        IdleNotice,
        Lease,
        LeaseEvent,
        LeaseEventKind,
        LeaseState,
        Method,
        Placement,
        Preemption,
        Reason,
        Rejection,
        RejectionCode,
        Resize,
        ResizeKind,
        WeightBy,
        WorkItem,
        WorkRequest,
    )
    from .telemetry import AttributionKind, DeviceEvent, ProcessBatch, ProcessSample, SampleBatch
    from .work.groups import Group, Groups, GroupStatus, GroupTree, Resources
    from .work.idle import IdleAction, IdleRule
    from .work.jobs import (
        Condition,
        Dependency,
        Job,
        JobAction,
        JobDetails,
        JobEvent,
        JobFilter,
        JobListing,
        Jobs,
        JobSpec,
        JobState,
        JobTask,
        JobVerb,
        TaskPart,
    )
    from .work.moves import Move, Moves
    from .work.notifications import NewsKind, Notifications, NotifyRule
    from .work.windows import Repeat, Window, WindowStatus

__all__ = [
    "Addition",
    "Assignment",
    "AttributionKind",
    "Condition",
    "Dependency",
    "DeviceEvent",
    "DeviceSample",
    "DeviceStatus",
    "Distribution",
    "Explanation",
    "FleetSummary",
    "GpuRange",
    "Grant",
    "Group",
    "GroupStatus",
    "GroupTree",
    "Groups",
    "IdleAction",
    "IdleNotice",
    "IdleRule",
    "Job",
    "JobAction",
    "JobDetails",
    "JobEvent",
    "JobFilter",
    "JobListing",
    "JobSpec",
    "JobState",
    "JobTask",
    "JobVerb",
    "Jobs",
    "Lease",
    "LeaseEvent",
    "LeaseEventKind",
    "LeaseState",
    "Method",
    "Move",
    "Moves",
    "NewsKind",
    "Notifications",
    "NotifyRule",
    "Placement",
    "Preemption",
    "ProcessBatch",
    "ProcessSample",
    "ProcessorStatus",
    "QueueEntry",
    "Reason",
    "Rejection",
    "RejectionCode",
    "Repeat",
    "Resize",
    "ResizeKind",
    "Resources",
    "ResultFormat",
    "SampleBatch",
    "TaskPart",
    "WeightBy",
    "Window",
    "WindowStatus",
    "WorkItem",
    "WorkRequest",
    "codec",
    "columns",
    "subjects",
]
_MODULES = ("codec", "columns", "subjects")
_SOURCES = (
    "work.groups",
    "work.idle",
    "work.jobs",
    "metrics",
    "work.moves",
    "work.notifications",
    "operations",
    "query",
    "requests",
    "telemetry",
    "work.windows",
)
"""Modules that define the messages, searched in this order."""


def __getattr__(name: str) -> object:
    if name == "bus":  # the former name of `subjects`, which programs import
        return _module("subjects")
    if name in _MODULES:
        return _module(name)
    if name in __all__:
        return next(vars(module)[name] for module in map(_module, _SOURCES) if name in vars(module))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _module(name: str) -> ModuleType:
    return import_module(f".{name}", __name__)
