"""Groups: trees that contradict themselves are refused; changes are durable, and their state follows the leases."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.broker.quotas.groups import changed
from corral.planner.broker.quotas.status import Asked, statuses
from corral.planner.groups.patterns import is_within, matches, pattern_of
from corral.planner.groups.state import GroupState
from corral.planner.groups.usage import Total
from corral.planner.groups.use import Amounts
from corral.planner.leases.lifecycle import Refused
from corral.schemas.requests import WorkRequest
from corral.schemas.values import globs
from corral.schemas.work.groups import GroupChange, GroupTree
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from support.planner_rig import FakeHosts, PlannerProcess, ask, persist, until_ready


def group(name: str, guarantee: dict[str, Any] | None = None, limit: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "guarantee": {"gpus": guarantee or {}}, "limit": {"gpus": limit or {}}, **more}


BEFORE = [
    group("lab", {"H100": 16, "*": 8}, members=["zoe"]),
    group("lab/nlp", {"H100 80GB": 8, "A100": 4}, members=["cat"]),
]
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"set": [group("x", members=["ann", "cat"])]}, "$.set[0].members[1]", "'lab/nlp' and 'x'"),
    ({"set": [group("x", members=["ann", "ann"])]}, "$.set[0].members", "twice"),
    ({"set": [group("default", members=["ann"])]}, "$.set[0].members", "no other group"),
    ({"set": [group("default/x")]}, "$.set[0].name", "no groups within"),
    ({"set": [group("/".join("abcdefghi"))]}, "$.set[0].name", "9 levels deep"),
    ({"set": [group("x"), group("x")]}, "$.set[1].name", "twice"),
    ({"replace": {"groups": [group("x"), group("x")]}}, "$.replace.groups[1].name", "two groups"),
    ({"set": [group("lab/vision", {"h100": 9})]}, "$.set[0].guarantee.gpus", "17 'H100', more than its own 16"),
    ({"set": [group("lab/vision", {"*": 5})]}, "$.set[0].guarantee.gpus", "9 '*', more than its own 8"),
    ({"set": [group("lab", {"H100": 16})]}, "$.set[0].guarantee.gpus", "'A100', of which"),
    ({"set": [group("lab", {"H100": 16, "*": 8}, {"*": 20})]}, "$.set[0].limit.gpus", "24 '*', more than its limit"),
    ({"set": [group("lab", limit={"A100": 2})]}, "$.set[0].limit.gpus", "4 'A100', more than its limit"),
    ({"set": [group("x", {"H100": 1, "*h100*": 1})]}, "$.set[0].guarantee.gpus", "the same pattern"),
    ({"set": [group("x", {" H100": 1})]}, "$.set[0].guarantee.gpus", "no pattern"),
    ({"set": [group("x", {f"a{at}?": 1 for at in range(40)})]}, "$.set[0].guarantee.gpus", "More than 32"),
    ({"replace": {"prices": {"H100": 2, "*H100*": 3}}}, "$.replace.prices", "the same pattern"),
    ({"set": [{"name": "x", "guarantee": {"cpus": 9}, "limit": {"cpus": 8}}]}, "$.set[0].limit.cpus", "9 cores"),
]


@pytest.mark.parametrize(("change", "field", "said"), WRONG)
def test_a_tree_that_contradicts_itself_is_refused_with_its_field(
    change: dict[str, Any], field: str, said: str
) -> None:
    before = msgspec.convert({"groups": BEFORE}, GroupTree)
    with pytest.raises(Refused) as refused:
        changed(before, msgspec.convert(change, GroupChange))
    assert (refused.value.error.code, refused.value.error.field) == ("invalid", field)
    assert said in refused.value.error.message


@given(st.text("ab*", min_size=1, max_size=5), st.text("ab*", min_size=1, max_size=5), st.text("abc", max_size=6))
def test_a_pattern_is_within_another_if_that_matches_all_that_it_matches(inner: str, outer: str, name: str) -> None:
    if is_within(inner, outer):
        assert matches(outer, name) or not matches(inner, name)
    else:  # with a letter that is in no pattern for each star, a name that `inner` alone matches
        assert not globs.matches(pattern_of(inner).replace("*", "c"), pattern_of(outer))


def test_a_group_is_owed_what_it_waits_for_within_its_guarantee() -> None:
    groups = [
        group("lab", {"H100": 8, "*": 4}),
        group("lab/vision", {"H100": 4}, weight=3, members=["ann"]),
        group("lab/nlp", {"H100": 4}, members=["cat"]),
        group("idle"),
        group("other", members=["eve"]),
    ]
    state = GroupState(msgspec.convert({"groups": groups}, GroupTree))
    state.usage.total = Total(16.0, 64.0, 2.0**40)
    whole = 10**9
    for number, (owner, model, count, preemptible) in enumerate(
        [("ann", "H100", 2, False), ("eve", "H100", 6, True), ("cat", "H100", 5, False)]
    ):
        amounts = Amounts({f"NVIDIA {model}": count * whole}, cpus_milli=500)
        state.use.hold(str(number), owner, amounts, preemptible)
        state.usage.starts(str(number), owner, amounts, 0.0)
    waiting = [
        Asked(WorkRequest(owner="ann", request_id="first"), whole, ("NVIDIA A100", "NVIDIA H100")),
        Asked(WorkRequest(owner="ann", request_id="second"), 3 * whole, ("NVIDIA H100",)),
        Asked(WorkRequest(owner="zoe", request_id="third"), whole, ("NVIDIA H100",)),
    ]
    found = {status.group.name: status for status in statuses(state, waiting, 100.0)}
    owed = {name: status.gpus_owed for name, status in found.items()}
    # One of four is beyond the guarantee of lab/vision; lab itself has room for one, and for another model.
    assert owed == {"default": 0.0, "idle": 0.0, "lab": 2.0, "lab/nlp": 0.0, "lab/vision": 2.0, "other": 0.0}
    borrowed = {name: status.gpus_borrowed for name, status in found.items() if status.gpus_borrowed}
    assert borrowed == {"lab/nlp": 1.0, "other": 6.0}
    assert [found[name].usage for name in ("lab", "lab/vision", "other")] == pytest.approx([7 / 13, 2 / 13, 6 / 13])
    fair = {name: status.fair_usage for name, status in found.items()}
    # The default group waits, and idle is shown what it would get.
    assert fair == pytest.approx(
        {"default": 1 / 3, "idle": 1 / 4, "lab": 1 / 3, "lab/nlp": 1 / 12, "lab/vision": 1 / 4, "other": 1 / 3}
    )
    assert (found["other"].preemptible_gpus, found["lab"].cpus_used) == (6.0, 1.0)
    assert [found[name].next_request_id for name in ("lab", "default", "lab/nlp")] == ["first", "third", ""]


def test_what_a_limit_keeps_from_being_claimed_is_not_owed() -> None:
    groups = [
        {"name": "lab", "limit": {"gpus": {"*": 6}}},
        group("lab/vision", {"H100": 4}, members=["ann"]),
        group("lab/nlp", {"H100": 2}, members=["cat"]),
        {"name": "lab/nlp/x", "limit": {"gpus": {"H100": 1}}, "members": ["xia"]},
    ]

    def owed(*held: tuple[str, int, bool]) -> dict[str, float]:
        state = GroupState(msgspec.convert({"groups": groups}, GroupTree))
        for number, (owner, count, preemptible) in enumerate(held):
            state.use.hold(str(number), owner, Amounts({"NVIDIA H100": count * 10**9}), preemptible)
        waiting = [
            Asked(WorkRequest(owner=owner, request_id=owner), 4 * 10**9, ("NVIDIA H100",)) for owner in ("ann", "xia")
        ]
        found = {one.group.name: one.gpus_owed for one in statuses(state, waiting, 100.0)}
        return {name.removeprefix("lab/"): amount for name, amount in found.items() if amount}

    # xia may have one of the two that nlp is guaranteed.
    assert owed() == {"lab": 5.0, "vision": 4.0, "nlp": 1.0}
    # Of the six under the limit of lab, nlp holds five for good: one is left, for whoever is first.
    assert owed(("cat", 5, False)) == {"lab": 1.0, "vision": 1.0}
    # Those that may be preempted are given back, down to what nlp is guaranteed.
    assert owed(("cat", 3, False), ("cat", 2, True)) == {"lab": 3.0, "vision": 3.0}
    assert owed(("cat", 5, True)) == {"lab": 4.0, "vision": 4.0}


@pytest.fixture
def planner(server: EmbeddedServer, tmp_path: Path) -> Iterator[PlannerProcess]:
    """A planner, not started yet, that does not outlive the test."""
    process = PlannerProcess(server.url, tmp_path / "planner.log")
    yield process
    process.kill()


async def test_changes_are_durable_and_the_state_follows_the_leases(nc: Client, planner: PlannerProcess) -> None:
    hosts = FakeHosts(nc, hosts=1)
    await hosts.start()
    planner.start()
    await until_ready(nc, 4)
    nobody = await ask(nc, "groups")
    assert [status["group"]["name"] for status in nobody["groups"]] == ["default"]
    assert nobody["revision"] == 0

    lab = {"name": "lab/vision", "guarantee": {"gpus": {"H100": 2}}, "limit": {"gpus": {"A100": 9}}, "members": ["ann"]}
    tried = await ask(nc, "set_groups", {"set": [lab], "dry_run": True})
    assert tried["revision"] == 0
    assert "lab/vision" in [status["group"]["name"] for status in tried["groups"]]
    assert (await ask(nc, "groups")) == nobody
    made = await ask(nc, "set_groups.olga", {"set": [lab], "revision": 0})
    assert (made["revision"], made["warnings"]) == (1, ["limit of 'lab/vision': no device of the fleet matches 'A100'"])
    # A repetition, as after an answer that was lost, is no conflict.
    assert await ask(nc, "set_groups.olga", {"set": [lab], "revision": 0}) == made
    late = await ask(nc, "set_groups", {"delete": ["lab"], "revision": 0})
    assert (late["code"], late["field"]) == ("conflict", "$.revision")
    wrong = await ask(nc, "set_groups", {"set": [{"name": "x", "members": ["ann"]}]})
    assert (wrong["code"], wrong["field"]) == ("invalid", "$.set[0].members[0]")
    forged = await ask(nc, "set_groups.olga", {"set": [lab], "operator": "eve"})
    assert forged["code"] == "refused"

    await ask(nc, "request", {"owner": "ann", "gpus": 3, "cpus": 6})
    await ask(nc, "request", {"owner": "bob", "gpu_share": 0.5})
    waiting = {"owner": "ann", "gpus": 2, "wait_seconds": 60, "request_id": "next", "ttl_seconds": 60}
    asked = asyncio.create_task(ask(nc, "request", waiting, timeout=60))
    while not (await ask(nc, "queue"))["entries"]:
        pass
    planner.kill()
    planner.start()
    found = (await persist(nc, "groups", {"name": "lab"}))["groups"]
    assert [status["group"]["name"] for status in found] == ["lab", "lab/vision"]
    for status in found:
        assert (status["gpus_used"], status["cpus_used"]) == ({"NVIDIA H100": 3.0}, 6.0)
        assert (status["gpus_guaranteed"], status["gpus_borrowed"], status["gpus_owed"]) == (2.0, 1.0, 0.0)
        assert (status["waiting_requests"], status["waiting_gpus"], status["next_request_id"]) == (1, 2.0, "next")
    everything = await ask(nc, "groups")
    assert (everything["groups"][0]["gpus_used"], everything["revision"]) == ({"NVIDIA H100": 0.5}, 1)
    assert (await ask(nc, "groups", {"name": "nobody"}))["code"] == "not_found"

    much = {"name": "b", "guarantee": {"gpus": {"H100": 3}, "cpus": 65, "host_memory_bytes": 2**40}}
    told = await ask(nc, "set_groups", {"set": [much]})
    assert told["warnings"][1:] == [
        "5 'H100' are guaranteed, and the fleet has 4",
        "5 devices are guaranteed, and the fleet has 4",
        "65 cores are guaranteed, and the fleet has 64",
        "1.0 TiB of RAM are guaranteed, and the fleet has 512.0 GiB",
    ]
    # The order of patterns counts.
    both = [{**much, "guarantee": {"gpus": gpus}} for gpus in ({"H100": 1, "NVIDIA": 1}, {"NVIDIA": 1, "H100": 1})]
    assert [(await ask(nc, "set_groups", {"set": [one]}))["revision"] for one in both] == [3, 4]
    many = [{"name": f"g{at}", "members": [f"owner-{at}-{number}" for number in range(40)]} for at in range(900)]
    assert (await ask(nc, "set_groups", {"set": many}))["code"] == "too_large"
    gone = await ask(nc, "set_groups", {"delete": ["lab", "unknown"]})
    assert [status["group"]["name"] for status in gone["groups"]] == ["b", "default"]
    asked.cancel()
    await hosts.stop()
