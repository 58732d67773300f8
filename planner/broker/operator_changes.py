"""Answers to changes by operators that were not made: refused, another leader's to make, or not taken by the bucket."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from msgspec import Struct

from ..durable.store import Deposed, WriteFailed
from ..leases.ledger import write_refused
from ..leases.lifecycle import Refused
from .pending import Responder


@asynccontextmanager
async def refusals(action: Struct, caller: Responder, deposed: Callable[[], None]) -> AsyncGenerator[None]:
    """Context of a change, in which its answer is sent; one that fails is answered here, or forwarded to the leader.

    Args:
        action: as it was sent.
        caller: that sent it.
        deposed: called when a write was refused since another planner leads.
    """
    try:
        yield
    except Refused as refused:
        await caller.answer(refused.error)
    except Deposed:
        deposed()
        caller.forward(action)
    except WriteFailed as error:
        await caller.answer(write_refused(error))
