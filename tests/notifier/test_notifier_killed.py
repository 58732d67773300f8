"""A notifier that is killed with -9 tells of every cause, and of none twice but what it was just sending."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client
from support.exporter_process import running as process
from support.local_cluster import CORRAL
from support.notifier_rig import Place, ended, publish, until
from support.receivers import webhook

RULE = '[[rule]]\nname = "all"\non = ["ended"]\nto = ["hook"]\n'
ROUNDS = 6
EACH = 8


def command(place: Place, server: EmbeddedServer) -> tuple[str, ...]:
    files = ("--targets", str(place.targets), "--rules", str(place.rules))
    return (*CORRAL, "notifier", *files, "--nats", server.url)


@pytest.mark.long
async def test_killed_at_any_moment_it_loses_nothing(server: EmbeddedServer, nc: Client, tmp_path: Path) -> None:
    place, log = Place(tmp_path), tmp_path / "notifier.log"
    chance = random.Random(7)
    with webhook() as hook:
        place.write(f'hook = "{hook.url}"', RULE)
        names = [f"n{number:03}" for number in range(ROUNDS * EACH)]

        def told() -> Counter[str]:
            """How often each name was in a message: alone, or in one for several."""
            text = [f"{body['title']}\n{body['message']}" for body in hook.bodies]
            return Counter({name: sum(f"{name} expired" in each for each in text) for name in names})

        with process(log, *command(place, server)):
            await until(lambda: "sending" in log.read_text())
        for round_ in range(ROUNDS):
            with process(log, *command(place, server)) as killed:
                some = names[round_ * EACH : (round_ + 1) * EACH]
                for number, name in enumerate(some):
                    if number == EACH // 2:
                        await until(lambda: "sending" in log.read_text())
                    await publish(nc, ended(f"l-{name}", name=name))
                # While it reads, keeps, sends or records.
                await asyncio.sleep(chance.uniform(0, 0.4))
                killed.send_signal(signal.SIGKILL)
                await asyncio.to_thread(killed.wait)
        with process(log, *command(place, server)):
            await until(lambda: all(told()[name] for name in names))
            await asyncio.sleep(1)
        twice = {name: count for name, count in told().items() if count > 1}
        assert len(hook.bodies) - len(set(hook.references)) <= ROUNDS
        assert max(twice.values(), default=1) <= 2, twice


@pytest.mark.long
async def test_killed_before_it_could_record_what_it_sent_it_sends_that_again_under_the_same_name(
    server: EmbeddedServer, nc: Client, tmp_path: Path
) -> None:
    place, log = Place(tmp_path), tmp_path / "notifier.log"
    with webhook() as hook:
        place.write(f'hook = "{hook.url}"', RULE)
        with process(log, *command(place, server)) as killed:
            await until(lambda: "sending" in log.read_text())
            hook.held.clear()
            await publish(nc, ended("l-1"))
            await until(lambda: hook.bodies)  # it has the message, and the notifier waits for the answer
            killed.send_signal(signal.SIGKILL)
            await asyncio.to_thread(killed.wait)
        hook.held.set()
        with process(log, *command(place, server)):
            await until(lambda: len(hook.bodies) == 2)
            await publish(nc, ended("l-2", name="next"))
            await until(lambda: len(hook.bodies) == 3)
        with process(log, *command(place, server)):
            await until(lambda: "sending" in log.read_text())
            await publish(nc, ended("l-1"), ended("l-3", name="last"))
            await until(lambda: len(hook.bodies) == 4)
        assert hook.references[0] == hook.references[1]
        assert hook.titles[2:] == ["next expired", "last expired"]
