"""`corral notify` and `corral notifier --check` as people use them."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client
from support.local_cluster import invoke
from support.notifier_rig import Place, running
from support.receivers import Webhook, webhook


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook() as made:
        yield made


async def test_a_rule_from_its_first_word_to_its_test(
    server: EmbeddedServer, nc: Client, hook: Webhook, tmp_path: Path
) -> None:
    place = Place(tmp_path)
    place.write(
        f'mine = {{ url = "{hook.url}", owners = ["ann"] }}\ndown = {{ url = "json://127.0.0.1:1/", owners = ["*"] }}',
        '[[rule]]\nname = "fleet"\non = "unhealthy"\nto = "mine"\n',
    )

    async def corral(*arguments: str, owner: str = "ann") -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(invoke, "notify", *arguments, url=server.url, CORRAL_OWNER=owner)

    async with running(server.url, place.files):
        added = await corral(
            *("add", "away", "--on", "preempted,job-ended", "--to", "mine", "--quiet", "22:00-07:00 Europe/Berlin"),
            *("--urgent", "preempted", "--workload", "train*"),
        )
        assert added.returncode == 0, added.stderr
        assert "corral notify test --rule away" in added.stderr
        listed = (await corral("list")).stdout
        assert "away" in listed
        assert "fleet" not in listed
        rows = (await corral("list", "--operator", owner="olga")).stdout
        assert all(word in rows for word in ("file", "fleet", "ann", "away", "workloads train*", "Europe/Berlin"))
        (rule,) = json.loads((await corral("list", "--json")).stdout)["rules"]
        assert rule["rule"]["zone"] == "Europe/Berlin"
        targets = (await corral("targets")).stdout
        assert "JSON" in targets
        assert "s3cr3t" not in targets
        tested = await corral("test", "--rule", "away")
        assert tested.returncode == 0, tested.stderr
        assert "mine: sent in" in tested.stdout
        assert hook.titles == ["Test of Corral's notifications"]
        failed = await corral("test", "--target", "down", "--json")
        assert failed.returncode == 1
        assert json.loads(failed.stdout)[0]["sent"] is False
        for words, arguments, owner in (
            ("no target 'mine' for bob: there are down", ("add", "x", "--on", "ended", "--to", "mine"), "bob"),
            ("--on: 'end' is none of granted", ("add", "x", "--on", "end", "--to", "mine"), "ann"),
            ("--to is missing", ("add", "x", "--on", "ended"), "ann"),
            ("--quiet: '22' is no quiet time", ("add", "x", "--on", "ended", "--to", "mine", "--quiet", "22"), "ann"),
            ("no time zone 'Moon'", ("add", "x", "--on", "ended", "--to", "mine", "--zone", "Moon"), "ann"),
            ("--idle-for", ("add", "x", "--on", "idle", "--to", "mine", "--idle-for", "2s"), "ann"),
            ("--queue-requests: ", ("add", "x", "--on", "queue-long", "--to", "mine"), "ann"),
            ("NAME: ", ("add", "a b", "--on", "ended", "--to", "mine"), "ann"),
            ("say what to test", ("test",), "ann"),
            ("ann has no rule 'gone': there are away", ("remove", "gone"), "ann"),
        ):
            wrong = await corral(*arguments, owner=owner)
            assert wrong.returncode in (2, 5), (arguments, wrong.stderr)
            assert words in wrong.stderr, (arguments, wrong.stderr)
        removed = await corral("remove", "away", "--operator", "--owner", "ann", owner="olga")
        assert removed.returncode == 0, removed.stderr
        assert json.loads((await corral("list", "--json")).stdout)["rules"] == []


def test_without_a_notifier_it_says_how_to_start_one(server: EmbeddedServer) -> None:
    found = invoke("notify", "list", url=server.url)
    assert found.returncode == 6
    assert "start one with `corral notifier`" in found.stderr


def test_files_are_checked_before_they_are_used(tmp_path: Path) -> None:
    targets, rules = tmp_path / "targets.toml", tmp_path / "rules.toml"

    def check(addresses: str, text: str = "", mode: int = 0o600) -> subprocess.CompletedProcess[str]:
        targets.write_text(f"[targets]\n{addresses}")
        targets.chmod(mode)
        rules.write_text(text)
        options = ("--targets", str(targets), "--rules", str(rules), "--check")
        return invoke("notifier", *options, url="nats://127.0.0.1:1")

    fine = check('a = "mailto://u:hush@h.example?to=a@b.example"', '[[rule]]\non = "ended"\nto = "a"')
    assert (fine.returncode, fine.stdout) == (0, "target a: E-Mail\nrule rule-1: ended to a\n")
    for words, found in (
        ("did you mean slack://?", check('a = "slak://hush/x"')),
        (f"chmod 600 {targets}", check('a = "json://h"', mode=0o644)),
        ("there is no target b for it; there are a", check('a = "json://h"', '[[rule]]\non = "ended"\nto = "b"')),
        ("no key 'urls': did you mean 'url'?", check('a = { urls = "json://hush" }')),
        ("Expected text", check("a = { url = 7 }")),
        ("is none of granted", check('a = "json://h"', '[[rule]]\non = "x"\nto = "a"')),
        ("is no TOML", check("a = hush")),
    ):
        assert found.returncode == 2, found.stdout
        assert words in found.stderr
        assert "hush" not in found.stderr
    missing = invoke("notifier", "--targets", str(tmp_path / "gone"), "--check", url="nats://127.0.0.1:1")
    assert "--targets: there is no file" in missing.stderr
