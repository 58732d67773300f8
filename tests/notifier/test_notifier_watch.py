"""What no event tells: found by asking the planner, once for each episode, whether or not the planner is there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.notifier import conditions
from corral.schemas import codec
from corral.schemas.operations import Devices, Leases, Queue, QueueEntry
from corral.schemas.requests import IdleNotice
from corral.schemas.subjects import PlanSubject
from corral.schemas.work.groups import Group, Groups, GroupStatus
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from support.notifier_examples import device, lease
from support.notifier_rig import Place, running, sends, until
from support.receivers import Webhook, webhook

RULES = """
[[rule]]
name = "fleet"
on = ["unhealthy", "queue-long", "over-share"]
queue_requests = 2
resolved = true
to = ["hook"]
[[rule]]
name = "leases"
on = ["expiring", "idle"]
owner = "ann"
to = ["hook"]
"""


class Planner:
    """Answers of a planner, without one: what the fleet is like is up to the test.

    Attributes:
        answers: by subject.
        asked: number of questions.
    """

    def __init__(self, nc: Client) -> None:
        self.answers: dict[str, Any] = {
            PlanSubject.LEASES: Leases(leases=[]),
            PlanSubject.DEVICES: Devices(devices=[]),
            PlanSubject.QUEUE: Queue(entries=[]),
            PlanSubject.GROUPS: Groups(groups=[]),
        }
        self.asked = 0
        self._nc = nc
        self._subscriptions: list[Subscription] = []

    async def start(self) -> None:
        async def answer(message: Msg) -> None:
            self.asked += 1
            await self._nc.publish(message.reply, codec.encode(self.answers[message.subject], codec.JSON))

        self._subscriptions = [await self._nc.subscribe(subject, cb=answer) for subject in self.answers]
        await self._nc.flush()

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        await self._nc.flush()


@pytest.fixture
async def planner(nc: Client) -> Planner:
    made = Planner(nc)
    await made.start()
    return made


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook() as made:
        yield made


def queue(length: int) -> Queue:
    entries = [
        QueueEntry(request_id=f"r-{n}", owner="bob", position=n + 1, waiting_seconds=60.0, message="full", gpus=4)
        for n in range(length)
    ]
    return Queue(entries=entries, total=length)


async def test_an_episode_is_told_once_over_restarts_and_outages_and_its_end_too(
    server: EmbeddedServer,
    planner: Planner,
    hook: Webhook,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Place(tmp_path)
    place.write(f'hook = "{hook.url}"', RULES)
    broken = Devices(devices=[device("GPU-1", "unhealthy", health="Xid 79: fallen off the bus")])
    planner.answers |= {PlanSubject.DEVICES: broken, PlanSubject.QUEUE: queue(3)}
    async with running(server.url, place.files, every_seconds=0.1) as notifier:
        await until(lambda: len(hook.bodies) == 2)
        # A planner that does not answer says nothing about the fleet.
        await planner.stop()
        await until(lambda: any("devices" in reason or "leases" in reason for reason in notifier._judge().reasons))
        await planner.start()
        await until(lambda: not notifier._judge().reasons)
        asked = planner.asked
        await until(lambda: planner.asked > asked + 20)
    async with running(server.url, place.files, every_seconds=0.1) as notifier:
        asked = planner.asked
        await until(lambda: planner.asked > asked + 20 and sends(notifier))
        # Shortly below the limit is not over.
        planner.answers[PlanSubject.QUEUE] = queue(1)
        asked = planner.asked
        await until(lambda: planner.asked > asked + 12)
        planner.answers[PlanSubject.QUEUE] = queue(3)
        asked = planner.asked
        await until(lambda: planner.asked > asked + 12)
        assert len(hook.bodies) == 2
        monkeypatch.setattr(conditions, "HOLD_SECONDS", 0.2)
        planner.answers |= {PlanSubject.DEVICES: Devices(devices=[device("GPU-1")]), PlanSubject.QUEUE: queue(0)}
        await until(lambda: len(hook.bodies) == 4)
        planner.answers[PlanSubject.QUEUE] = queue(2)  # another episode
        await until(lambda: len(hook.bodies) == 5)
    assert sorted(hook.titles[:2]) == [
        "The queue is long: 3 requests waiting, one for 60s",
        "node-7: NVIDIA H100 0 is unhealthy",
    ]
    assert sorted(hook.titles[2:4]) == ["The queue is short again", "node-7: NVIDIA H100 0 is healthy again"]
    assert hook.titles[4].startswith("The queue is long: 2")


async def test_leases_that_end_soon_idle_leases_and_groups_beyond_their_share(
    server: EmbeddedServer, planner: Planner, hook: Webhook, tmp_path: Path
) -> None:
    place = Place(tmp_path)
    place.write(f'hook = "{hook.url}"', RULES)
    now = datetime.now(UTC)
    warned = IdleNotice(group="lab", rule="below 5% for 30m: end after 10m", since=now, noticed_at=now, acts_at=now)
    planner.answers |= {
        PlanSubject.LEASES: Leases(
            leases=[
                lease("soon", at=now - timedelta(minutes=55), name="soon"),
                lease("later", at=now, name="later"),
                lease("idle", at=now, name="idle", idle=warned),
                lease("bobs", at=now - timedelta(minutes=55), owner="bob"),
            ]
        ),
        PlanSubject.GROUPS: Groups(
            groups=[
                GroupStatus(group=Group(name="greedy"), usage=0.8, fair_usage=0.5, waiting_requests=1),
                GroupStatus(group=Group(name="modest"), usage=0.2, fair_usage=0.5, waiting_requests=3),
            ]
        ),
    }
    async with running(server.url, place.files, every_seconds=0.1):
        await until(lambda: len(hook.bodies) == 3)
        asked = planner.asked
        await until(lambda: planner.asked > asked + 20)
        assert len(hook.bodies) == 3
    by_kind = sorted(title.split(":")[0].split(" ends")[0] for title in hook.titles)
    assert by_kind == ["Group greedy is over its share", "idle", "soon"]
    (expiring,) = (body["message"] for body in hook.bodies if body["title"].startswith("soon ends"))
    assert "Keep it: corral renew soon" in expiring


async def test_a_group_without_a_rule_asks_the_planner_nothing(
    server: EmbeddedServer, planner: Planner, hook: Webhook, tmp_path: Path
) -> None:
    place = Place(tmp_path)
    place.write(f'hook = "{hook.url}"', '[[rule]]\non = "ended"\nto = "hook"')
    async with running(server.url, place.files, every_seconds=0.05):
        await asyncio.sleep(0.5)
    assert planner.asked == 0
