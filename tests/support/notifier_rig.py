"""A notifier in the test's own process, with its files, and events as the planner publishes them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from corral.notifier import outgoing
from corral.notifier.rulebook import Files
from corral.notifier.service import Notifier, NotifierSettings
from corral.schemas import codec, subjects
from corral.schemas.requests import LeaseEvent, LeaseEventKind, LeaseState
from nats.aio.client import Client
from support.notifier_examples import event, lease


class Place:
    """The operator's files."""

    def __init__(self, folder: Path) -> None:
        self.targets = folder / "targets.toml"
        self.rules = folder / "rules.toml"
        self.write("", "")

    def write(self, targets: str, rules: str) -> None:
        for path, text in ((self.targets, f"[targets]\n{targets}"), (self.rules, rules)):
            fresh = path.with_suffix(".new")
            fresh.write_text(text)
            fresh.chmod(0o600)
            fresh.replace(path)

    @property
    def files(self) -> Files:
        return Files(rules=self.rules, targets=self.targets)


@contextlib.asynccontextmanager
async def running(url: str, files: Files, **more: Any) -> AsyncIterator[Notifier]:
    """A notifier that sends, in this process; it tries again soon."""
    often = {"every_seconds": 0.5, "reread_seconds": 0.05}
    made = Notifier(NotifierSettings(files=files, nats_url=url, **(often | more)))
    with mock.patch.object(outgoing, "FIRST_RETRY_SECONDS", 0.1):
        task = asyncio.create_task(made.run())
        await until(lambda: sends(made) or task.done())
        yield made
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def sends(notifier: Notifier) -> bool:
    """Whether it reads both streams."""
    status = notifier._judge()
    return status.values["active"] == 1.0 and not any("begun" in reason for reason in status.reasons)


async def until(found: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "nothing in time"
        await asyncio.sleep(0.02)


async def publish(nc: Client, *events: LeaseEvent) -> None:
    for each in events:
        subject = subjects.lease_subject(each.kind.value, each.lease.lease_id)
        await nc.jetstream().publish(subject, codec.encode(each, codec.JSON))


def ended(lease_id: str, **more: Any) -> LeaseEvent:
    found = lease(lease_id, state=LeaseState.EXPIRED, ended_at=datetime.now(UTC), **more)
    return event(LeaseEventKind.EXPIRED, found)
