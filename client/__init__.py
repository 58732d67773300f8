"""Corral from Python: `SyncClient`, `lease` and `submit` for scripts and notebooks, `connect` for asyncio.

from corral.client import lease

with lease(gpus=2, memory="20GiB") as held:
    subprocess.run(["python", "train.py"], env=os.environ | held.environment)
"""

from __future__ import annotations

import sys as _sys

from .client import Client, connect
from .errors import (
    Conflict,
    CorralError,
    Ended,
    Forked,
    InvalidRequest,
    LeaseLost,
    NoService,
    NotFound,
    NotOwner,
    QueryFailed,
    Refused,
    Rejected,
    ServiceError,
    TimedOut,
    TooManyRequests,
    Unavailable,
)
from .jobs.logs import LogPiece
from .jobs.results import progress
from .jobs.submitted import SubmittedJob, as_completed, map, submit  # noqa: A004
from .leases.lease import HeldLease, OnOutage
from .notebook import load_ipython_extension
from .result import QueryResult
from .sync import SyncClient, lease

__all__ = [
    "Client",
    "Conflict",
    "CorralError",
    "Ended",
    "Forked",
    "HeldLease",
    "InvalidRequest",
    "LeaseLost",
    "LogPiece",
    "NoService",
    "NotFound",
    "NotOwner",
    "OnOutage",
    "QueryFailed",
    "QueryResult",
    "Refused",
    "Rejected",
    "ServiceError",
    "SubmittedJob",
    "SyncClient",
    "TimedOut",
    "TooManyRequests",
    "Unavailable",
    "as_completed",
    "connect",
    "lease",
    "load_ipython_extension",
    "map",
    "progress",
    "submit",
]

# In a notebook, devices and leases show as tables without being asked to.
if (_ipython := _sys.modules.get("IPython")) is not None and (_shell := _ipython.get_ipython()) is not None:
    load_ipython_extension(_shell)
