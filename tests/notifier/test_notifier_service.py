"""The notifier on a real bus, with a real webhook and a real mail server: once for each cause, whatever fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from corral.bus.layout import ensure_layout
from corral.bus.stream_reader import read
from corral.cli.local.server import EmbeddedServer
from corral.client import Client as CorralClient
from corral.client import InvalidRequest, NotFound, SyncClient, TooManyRequests
from corral.client.health import ask_health
from corral.notifier.rulebook import Files, RuleBook
from corral.notifier.store import Store
from corral.schemas import codec, subjects
from corral.schemas.work.notifications import NewsKind, NotifyRule
from nats.aio.client import Client
from nats.js import api
from support.empty_history import empty_history
from support.exporter_process import running as process
from support.local_cluster import CORRAL
from support.notifier_examples import delivery, job_event, preempting
from support.notifier_rig import Place, ended, publish, running, until
from support.receivers import Mailbox, Webhook, mail_server, webhook

SECRET = "s3cr3t-t0k3n"


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook() as made:
        yield made


@pytest.fixture
def mails() -> Iterator[Mailbox]:
    with mail_server() as made:
        yield made


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


ALL = '[[rule]]\nname = "all"\non = ["ended", "preempted", "job-ended"]\nto = ["hook"]\n'


async def test_news_reach_a_webhook_and_a_mailbox_once(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook, mails: Mailbox
) -> None:
    place.write(
        f'hook = "{hook.url}"\nntfy = "{hook.ntfy}"\nmail = "{mails.url}"',
        ALL + '[[rule]]\non = "preempted"\nowner = "ann"\nto = ["mail", "ntfy"]\nzone = "Europe/Berlin"',
    )
    async with running(server.url, place.files):
        # What the planner publishes again, and what comes on the wrong subject, is nothing new.
        notice = preempting("l-1")
        await publish(nc, notice, notice, preempting("l-2", owner="bob"))
        await nc.jetstream().publish(subjects.lease_subject("evicted", "x"), codec.encode(ended("l-9"), codec.JSON))
        await nc.jetstream().publish(subjects.lease_subject("expired", "y"), b"no JSON")
        await nc.jetstream().publish(subjects.job_events_subject("12"), codec.encode(job_event(), codec.JSON))
        await publish(nc, ended("l-3"))
        await until(lambda: len(hook.bodies) >= 5 and mails.mails)
    titles = sorted(body["title"] for body in hook.bodies if "version" in body)
    assert titles == [
        "Job 12 (sweep) is done",
        "train expired",
        *["train will be preempted at Mon 30 Nov 12:02 UTC: save your work"] * 2,
    ]
    (to_ntfy,) = (body for body in hook.bodies if "topic" in body)
    assert to_ntfy["title"].startswith("train will be preempted at Mon 30 Nov 13:02 CET")
    (mail,) = mails.mails
    assert mail["Subject"] == to_ntfy["title"]
    assert "When it is saved: corral saved --lease l-1" in mail.get_content()


async def test_what_happened_before_its_first_start_is_no_news_and_afterwards_all_is(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook
) -> None:
    place.write(f'hook = "{hook.url}"', ALL)
    await publish(nc, ended("before"))
    async with running(server.url, place.files):
        await publish(nc, ended("l-1"))
        await until(lambda: hook.bodies)
    await publish(nc, ended("l-2", name="while-away"))
    async with running(server.url, place.files):
        await publish(nc, ended("l-1"), ended("l-3"))
        await until(lambda: len(hook.bodies) == 3)
    assert hook.titles == ["train expired", "while-away expired", "train expired"]
    assert len(set(hook.references)) == 3


async def test_a_target_that_is_down_delays_no_other_and_gets_all_when_it_is_back(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook
) -> None:
    with webhook() as down:
        down.status = 503
        place.write(f'hook = "{hook.url}"\ndown = "{down.url}"', ALL.replace('["hook"]', '["down", "hook"]'))
        async with running(server.url, place.files) as notifier:
            for number in range(5):
                await publish(nc, ended(f"l-{number}", name=f"n{number}"))
                await until(lambda number=number: len(hook.bodies) == number + 1)
            await until(lambda: down.tries > 1)
            await until(lambda: notifier._judge().values["waiting_messages"] == {"down": 5.0, "hook": 0.0})
            assert notifier._judge().values["failing_seconds"]["down"] > 0  # type: ignore[index]
            found = await CorralClient(nc, owner="olga").notifications.rules(override=True)
            (state,) = (each for each in found.targets if each.name == "down")
            assert state.waiting == 5
            assert state.failing_since is not None
            assert state.problem
            assert SECRET not in repr(found)
            down.status = 200
            await until(lambda: notifier._judge().values["waiting_messages"] == {"down": 0.0, "hook": 0.0})
        # Those that were due at once came as one message.
        assert down.titles == ["5 notifications"]
        assert all(f"n{number} expired" in down.bodies[0]["message"] for number in range(5))


async def test_what_can_not_be_sent_for_too_long_is_given_up_and_counted(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook
) -> None:
    hook.status = 500
    place.write(f'hook = "{hook.url}"', ALL)
    async with running(server.url, place.files, give_up_seconds=0.5) as notifier:
        await publish(nc, ended("l-1"))
        await until(lambda: notifier._judge().values["given_up_messages"] == {"hook": 1.0})
        await until(lambda: notifier._judge().values["waiting_messages"] == {"hook": 0.0})


async def test_an_attempt_that_hangs_holds_up_only_its_target(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook
) -> None:
    with webhook() as stuck:
        stuck.held.clear()
        place.write(f'hook = "{hook.url}"\nstuck = "{stuck.url}?rto=30"', ALL.replace('["hook"]', '["stuck", "hook"]'))
        async with running(server.url, place.files, send_seconds=0.5) as notifier:
            await publish(nc, ended("l-1"))
            await until(lambda: hook.bodies and stuck.tries)
            await until(lambda: notifier._judge().values["failed_attempts"].get("stuck", 0) > 1)  # type: ignore[union-attr]
            assert stuck.tries == 1, "it was not asked again while the attempt hung"
            await publish(nc, ended("l-2"))
            await until(lambda: len(hook.bodies) == 2)
        stuck.held.set()


async def test_what_waits_for_the_end_of_quiet_hours_comes_as_one_message(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook
) -> None:
    place.write(f'hook = "{hook.url}"', "")
    store = Store(nc)
    await store.prepare()
    now = datetime.now(UTC)
    later = now + timedelta(seconds=1)
    waiting = [delivery(f"c{n}", "hook", now - timedelta(seconds=9 - n), later) for n in range(3)]
    assert await store.add_deliveries(waiting) == waiting
    assert await store.add_deliveries(waiting) == [], "each once"
    async with running(server.url, place.files):
        await until(lambda: hook.bodies)
        assert datetime.now(UTC) >= later
    assert hook.titles == ["3 notifications from your quiet hours"]


async def test_a_notifier_goes_on_when_the_bus_is_away(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook
) -> None:
    place.write(f'hook = "{hook.url}"', ALL)
    async with running(server.url, place.files):
        await publish(nc, ended("l-1"))
        await until(lambda: hook.bodies)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await until(lambda: nc.is_connected)
        await publish(nc, ended("l-2"))
        await until(lambda: len(hook.bodies) == 2)
        # The stream is made anew, as from a backup without it: what comes then is news.
        await nc.jetstream().delete_stream(subjects.FACTS_STREAM)
        await ensure_layout(nc.jetstream())
        await publish(nc, ended("l-2"), ended("l-3", name="anew"))
        await until(lambda: len(hook.bodies) == 3)
    assert hook.titles[-1] == "anew expired"


async def test_owners_keep_rules_of_their_own(server: EmbeddedServer, nc: Client, place: Place, hook: Webhook) -> None:
    folder = place.rules.parent / "owners"
    folder.mkdir()
    place.write(f'ops = "{hook.url}"\nlab = {{ url = "{hook.url}", owners = ["a*"] }}', "")
    (folder / "ann.toml").write_text(f'[targets]\nhook = "{hook.url}"\n')
    (folder / "ann.toml").chmod(0o600)
    ann, bob = (CorralClient(nc, owner=name).notifications for name in ("ann", "bob"))
    rule = NotifyRule(name="mine", on=[NewsKind.ENDED], to=["hook"])
    async with running(server.url, Files(targets=place.targets, folder=folder)):
        assert [each.name for each in (await ann.rules()).targets] == ["hook", "lab"]
        assert (await bob.rules()).targets == []
        with pytest.raises(NotFound, match="no target 'ops' for ann: there are hook, lab"):
            await ann.set(NotifyRule(name="x", on=[NewsKind.ENDED], to=["ops"]))
        with pytest.raises(NotFound, match="no target 'hook' for bob: there is none yet"):
            await bob.set(rule)
        with pytest.raises(InvalidRequest, match="no time zone 'Mars'"):
            await ann.set(NotifyRule(name="x", on=[NewsKind.ENDED], to=["hook"], zone="Mars"))
        assert [each.rule for each in (await ann.set(rule)).rules] == [rule]
        await publish(nc, ended("l-1", owner="bob"), ended("l-2", name="of-ann"))
        await until(lambda: hook.bodies)
        assert hook.titles == ["of-ann expired"]
        with pytest.raises(NotFound, match="ann has no rule 'other': there are mine"):
            await ann.remove("other")
        (result,) = (await ann.test(rule="mine")).results
        assert (result.target, result.sent) == ("hook", True)
        with pytest.raises(NotFound, match="bob has no rule 'mine'"):
            await bob.test(rule="mine")
        for _ in range(5):
            await ann.test(target="hook")
        with pytest.raises(TooManyRequests, match="6 tests a minute"):
            await ann.test(target="hook")
        # The subject says who asks: a body can't say that it is another.
        message = b'{"owner": "ann", "verb": "remove", "name": "mine"}'
        answer = await nc.request(f"{subjects.NOTIFY_RULES}.bob", message, timeout=10)
        assert b"refused" in answer.data
        answer = await nc.request(subjects.unnamed(subjects.NOTIFY_RULES), b"{}", timeout=10)
        assert b"ask on corral.v1.notify.rules.<owner>" in answer.data
    # They outlive the notifier.
    async with running(server.url, Files(targets=place.targets, folder=folder)):
        operator = CorralClient(nc, owner="olga").notifications
        everything = await operator.rules(override=True)
        assert [(each.owner, each.rule.name) for each in everything.rules] == [("ann", "mine")]
        assert [each.name for each in everything.targets] == ["ann/hook", "lab", "ops"]

        def without_asyncio() -> list[NotifyRule]:
            with SyncClient(server.url, owner="ann") as client:
                client.notifications.set(NotifyRule(name="more", on=[NewsKind.REPORT], to=["hook"]))
                assert client.notifications.test(target="hook").results[0].sent
                client.notifications.remove("more")
                return [each.rule for each in client.notifications.rules().rules]

        assert await asyncio.to_thread(without_asyncio) == [rule]
        await operator.remove("mine", owner="ann", override=True)
        assert (await ann.rules()).rules == []


def test_a_file_counts_once_it_is_written_whole(place: Place) -> None:
    place.write('hook = "json://127.0.0.1:9"', ALL)
    book = RuleBook(place.files)
    book.read()
    whole = place.targets.read_text() + "\n"
    for length in range(len(whole)):
        place.targets.write_text(whole[:length])
        assert not book.reread()
        assert list(book.targets.by_name) == ["hook"]
    place.targets.write_text(whole)
    assert [book.reread(), book.reread(), book.reread()] == [False, True, False]
    assert (list(book.targets.by_name), book.problems) == (["hook"], [])


async def test_changed_files_count_without_a_restart_and_wrong_ones_change_nothing(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook
) -> None:
    place.write(f'hook = "{hook.url}"', "")
    async with running(server.url, place.files) as notifier:
        place.write(f'hook = "{hook.url}"', ALL)
        await until(lambda: notifier._judge().values["rules"] == 1.0)
        place.write(f'hook = "{hook.url}"', '[[rule]]\non = "nothing"\nto = "hook"')
        await until(lambda: any("is none of granted" in reason for reason in notifier._judge().reasons))
        place.targets.chmod(0o644)
        await until(lambda: any("chmod 600" in reason for reason in notifier._judge().reasons))
        await publish(nc, ended("l-1"))
        await until(lambda: hook.bodies)
        # A rule that names what is not there is listed as such, and the others count.
        place.write(f'hook = "{hook.url}"', ALL + '[[rule]]\non = "ended"\nto = "gone"')
        await until(lambda: notifier._judge().values["unusable_rules"] == 1.0)
        await publish(nc, ended("l-2"))
        await until(lambda: len(hook.bodies) == 2)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """All lines that reach the root logger, as those of a service do; pytest's own fixture takes others, too."""
    root = logging.getLogger()
    handler, level = logging.FileHandler(path), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield
    root.setLevel(level)
    root.removeHandler(handler)
    handler.close()


async def test_no_secret_is_on_the_bus_in_health_or_in_the_log(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook, tmp_path: Path
) -> None:
    hook.status = 401
    rule = ALL.replace('["hook"]', '["hook", "wrong"]')
    place.write(f'hook = "{hook.url}"\nwrong = "slack://{SECRET}/{SECRET}"', rule)
    with logged(tmp_path / "log"):
        async with running(server.url, place.files) as notifier:
            await publish(nc, ended("l-1"))
            await until(lambda: notifier._judge().values["failed_attempts"].keys() == {"hook", "wrong"})  # type: ignore[union-attr]
            client = CorralClient(nc, owner="olga").notifications
            results = (await client.test(target="hook", override=True)).results
            assert not results[0].sent
            assert SECRET not in repr(results)
            assert SECRET not in repr(notifier._judge())
            stored = 0
            for info in await nc.jetstream().streams_info():
                name = info.config.name or ""
                config = api.ConsumerConfig(deliver_policy=api.DeliverPolicy.ALL)
                async for message in read(nc, name, ">", config):
                    stored += 1
                    assert SECRET.encode() not in message.data
            assert stored > 3
    assert "nothing can be sent to wrong" in (tmp_path / "log").read_text()
    assert SECRET not in (tmp_path / "log").read_text()


@pytest.mark.long
async def test_many_jobs_that_end_at_once_do_not_wait_for_each_others_summaries(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook, tmp_path: Path
) -> None:
    """The history knows none of these jobs, so that each summary would be waited for in vain."""
    shutil.copy(empty_history(), tmp_path / "history.duckdb")
    place.write(f'hook = "{hook.url}"', ALL)
    command = (*CORRAL, "process", "--db", str(tmp_path / "history.duckdb"), "--nats", server.url)
    with process(tmp_path / "processor.log", *command, CORRAL_THREADS="1"):
        await CorralClient(nc, patience=60).query("SELECT 1")
        async with running(server.url, place.files) as notifier:
            for number in range(100):
                event = codec.encode(job_event(str(number)), codec.JSON)
                await nc.jetstream().publish(subjects.job_events_subject(str(number)), event)
            # All but the few that are looked up.
            await until(lambda: notifier._judge().values["news"].get("job-ended", 0) >= 92)  # type: ignore[union-attr]
            await until(lambda: hook.bodies)


@pytest.mark.long
async def test_a_second_notifier_stands_by_and_takes_over(
    server: EmbeddedServer, nc: Client, place: Place, hook: Webhook, tmp_path: Path
) -> None:
    place.write(f'hook = "{hook.url}"', ALL)
    log = tmp_path / "second.log"
    options = ("--targets", str(place.targets), "--rules", str(place.rules), "--nats", server.url)
    async with running(server.url, place.files):
        with process(log, *CORRAL, "notifier", *options):
            await until(lambda: "standing by" in log.read_text())
            (health,) = [each for each in await ask_health(nc, "notifier") if each.role == "standby"]
            assert health.ready
            await publish(nc, ended("l-1"))
            await until(lambda: hook.bodies)
            assert "sending" not in log.read_text()
        await until(lambda: "shut down" in log.read_text())
    # It takes over while the first one's process is alive, since the first gave the claim back.
    with process(log, *CORRAL, "notifier", *options):
        await until(lambda: "sending: 1 rules" in log.read_text())
        await publish(nc, ended("l-2"))
        await until(lambda: len(hook.bodies) == 2)
    assert len(set(hook.references)) == 2


def test_no_owners_file_speaks_for_another(tmp_path: Path) -> None:
    from corral.notifier.targets import read

    for name, owner in (("ann", ""), ("bob", "ann"), ("slash", "lab/ann"), ("thief", "lab/ann")):
        path = tmp_path / f"{name}.toml"
        path.write_text(f'{owner and f"owner = {owner!r}"}\n[targets]\nhook = "json://{name}.example"\n')
        path.chmod(0o600)
    targets, problems = read(None, tmp_path)
    assert {name: target.url for name, target in targets.by_name.items()} == {
        "ann/hook": "json://ann.example",
        "lab/ann/hook": "json://slash.example",
    }
    assert problems == [
        f"{tmp_path}/bob.toml: the file of ann has the name ann.toml",
        f"{tmp_path}/thief.toml: {tmp_path}/slash.toml is the file of lab/ann already",
    ]


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    from corral.notifier.targets import WrongTargets, read

    path = tmp_path / "targets.toml"
    path.write_text('[targets]\nmail = "mailto://u:pw@h.example"\n')
    for mode, fine in ((0o600, True), (0o640, True), (0o400, True), (0o644, False), (0o660, False), (0o604, False)):
        os.chmod(path, mode)
        if fine:
            assert read(path)[0].by_name.keys() == {"mail"}
        else:
            with pytest.raises(WrongTargets, match=f"chmod 600 {path}"):
                read(path)
