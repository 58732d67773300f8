"""From what happens in a fleet to the message about it, with every part on a bus that checks permissions."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from corral.bus.access.roles import Role
from support.local_cluster import wait_for
from support.notifier_rig import Place
from support.receivers import webhook
from support.secured_bus import SecuredBus

RULES = """
[[rule]]
name = "fleet"
on = ["queue-long", "preempted", "expiring"]
queue_requests = 1
to = ["ops"]
"""


@pytest.mark.long
def test_people_hear_of_their_turn_their_end_and_their_jobs(tmp_path: Path) -> None:
    secured = SecuredBus(tmp_path)
    for role, name, fields in (
        (Role.PLANNER, "planner", {}),
        (Role.PROCESSOR, "processor", {}),
        (Role.COLLECTOR, "collector", {"hosts": ["*"], "follows_leases": True}),
        (Role.RUNNER, "runner", {"hosts": ["*"]}),
        (Role.NOTIFIER, "notifier", {}),
        (Role.REQUESTER, "ann", {}),
        (Role.REQUESTER, "bob", {}),
        (Role.OPERATOR, "olga", {}),
    ):
        secured.add(role, name, **fields)
    place = Place(tmp_path)
    secured.server.start()
    with contextlib.ExitStack() as stack:
        stack.callback(secured.server.kill)
        hook = stack.enter_context(webhook())
        place.write(f'ops = "{hook.url}"\npeople = {{ url = "{hook.ntfy}", owners = ["*"] }}', RULES)
        simulated = ("--source", "simulated", "--hosts", "1", "--devices", "2", "--interval", "400ms")
        for name, arguments in (
            ("processor", ("process", "--db", str(tmp_path / "history.duckdb"))),
            ("planner", ("plan",)),
            ("collector", ("collect", *simulated)),
            ("runner", ("runner", "--own-account", "--host", "sim-0001", "--state", str(tmp_path / "runner"))),
            ("notifier", ("notifier", "--targets", str(place.targets), "--rules", str(place.rules), "--every", "1s")),
        ):
            stack.enter_context(secured.part(name, *arguments))

        def corral(name: str, *arguments: str) -> Any:
            done = secured.corral(name, *arguments, "--json")
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        def told(*words: str) -> Any:
            return wait_for(lambda: [body for body in hook.bodies if all(word in str(body) for word in words)])[0]

        wait_for(lambda: '"usable_devices":2,' in secured.corral("olga", "fleet", "--json").stdout)
        wait_for(lambda: "sending: 1 rules" in (tmp_path / "notifier.log").read_text())
        on = "granted,ended,job-ended,job-started"
        secured.corral("ann", "notify", "add", "mine", "--on", on, "--waited", "1s", "--to", "people")

        # Bob has the fleet, and ann waits until his lease is preempted.
        held = corral("bob", "request", "--gpus", "2", "--preemptible", "--grace", "3s", "--ttl", "5m")["lease"]
        asking = stack.enter_context(secured.part("ann", "request", "--gpus", "2", "--ttl", "15s", "--wait", "2m"))
        assert "topic" not in told("The queue is long: 1 request")
        corral("olga", "preempt", held["lease_id"], "--reason", "for the demo")
        notice = told(held["lease_id"], "will be preempted")
        assert "for the demo" in notice["message"]
        assert asking.wait(60) == 0
        turn = told("your turn", "2 ×")
        assert turn["topic"] == "corral-topic"
        (lease,) = corral("ann", "leases")["leases"]
        assert f"corral renew {lease['lease_id']}" in turn["message"]
        told("ends at", lease["lease_id"])
        assert not [body for body in hook.bodies if "topic" in body and "bob" in str(body)]
        told("expired", lease["lease_id"])

        command = ("sh", "-c", "sleep 2; exit 3")
        submitted = secured.corral("ann", "submit", "--gpus", "1", "--name", "sweep", "--", *command)
        assert submitted.returncode == 0, submitted.stderr
        told("Job 1 (sweep) has started")
        end = told("Job 1 (sweep): failed")
        assert "exit code 3" in end["message"]
        assert "GPUs: 0.00 GPU-hours" in end["message"], "the summary from the history"
        assert secured.violations() == []
