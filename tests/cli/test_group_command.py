"""Groups from the command line: set by option, declared in a file, taken over from `corral auth`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from corral.bus.access.folder import Authority
from corral.bus.access.roles import Role
from corral.cli.operate.groups.diff import differences
from corral.cli.operate.groups.file import (
    GroupTextError,
    configured,
    format_amounts,
    format_file,
    parse_amounts,
    parse_file,
)
from corral.schemas.work.groups import Group, GroupTree, Resources
from corral.schemas.work.idle import IdleAction, IdleRule
from hypothesis import given, settings
from hypothesis import strategies as st
from support.local_cluster import LocalCluster, invoke

PATTERNS = st.sampled_from(["*", "H100", "*A100*", "cpus", "host_memory", 'A "B" é', "L40[SG]"])
AMOUNTS = st.builds(
    Resources,
    gpus=st.dictionaries(PATTERNS, st.floats(0, 1e6), max_size=3),
    cpus=st.none() | st.floats(0, 1e6),
    host_memory_bytes=st.none() | st.integers(0, 2**60),
)
IDLE = st.builds(
    IdleRule,
    below_percent=st.floats(0, 100),
    after_seconds=st.integers(60, 10**6).map(float),
    action=st.sampled_from([IdleAction.WARN, IdleAction.END]),
    warn_seconds=st.integers(0, 10**6).map(float),
) | st.sampled_from([IdleRule(action=IdleAction.OFF), IdleRule(no_process=True), None])
GROUPS = st.builds(
    Group,
    name=st.sampled_from(["lab", "lab/vision", "lab/vision/x", "default", "a.b-c_1"]),
    weight=st.floats(1e-6, 1e6),
    guarantee=AMOUNTS,
    limit=AMOUNTS,
    borrowing_limit=AMOUNTS,
    members=st.lists(st.sampled_from(["ann", "ben@x.org", "c:d/e+f"]), unique=True),
    idle=IDLE,
)
TREES = st.builds(
    GroupTree,
    groups=st.lists(GROUPS, unique_by=lambda group: group.name, max_size=3),
    prices=st.dictionaries(PATTERNS, st.floats(1e-6, 1e6)),
    half_life_seconds=st.floats(60, 366 * 86400) | st.sampled_from([60.0, 90.0, 7 * 86400.0]),
)


@settings(max_examples=25)
@given(TREES)
def test_a_file_says_the_same_tree_again(tree: GroupTree) -> None:
    once = parse_file(format_file(tree))
    assert parse_file(format_file(once)) == once
    assert [group.name for group in once.groups] == [group.name for group in configured(tree.groups)]
    assert once.prices == tree.prices
    assert once.half_life_seconds == pytest.approx(tree.half_life_seconds, abs=1e-6)
    for before, after in zip(configured(tree.groups), once.groups, strict=True):
        plain = {pattern: amount for pattern, amount in before.guarantee.gpus.items() if "_" not in pattern != "cpus"}
        assert plain.items() <= after.guarantee.gpus.items()
        assert len(after.limit.gpus) == len(before.limit.gpus)
        assert (after.limit.cpus, after.limit.host_memory_bytes) == (before.limit.cpus, before.limit.host_memory_bytes)
        assert (after.weight, after.members, after.idle) == (before.weight, before.members, before.idle)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[groups.lab.vision]\nweight = 2", '[groups."lab/vision"]'),
        ("[groups.lab]\ngarantee = 3", "did you mean `guarantee`?"),
        ("[group.lab]", "did you mean `groups`?"),
        ("[groups.lab.garantee]\nH100 = 3", "did you mean `guarantee`?"),
        ("[groups.lab]\nguarantee = { H100 = -1 }", "guarantee of group 'lab': H100: Expected a number of at least 0"),
        ("[groups.lab]\nguarantee = { H100 = nan }", "guarantee of group 'lab': H100: Expected a number"),
        ("[groups.lab]\nguarantee = { gpus = 8 }", 'for GPUs of any model use "*"'),
        ("[groups.lab]\nguarantee = { host_memry = '1GiB' }", "did you mean `host_memory`?"),
        ("[prices]\nH100 = 0", "prices: H100: Expected a number of at least 0.000001"),
        ("[groups.lab]\nguarantee = { memory = '1GiB' }", "use `cpus` or `host_memory`"),
        ("[groups.lab]\nlimit = { host_memory = 1.5 }", "expected text with a unit"),
        ("[groups.lab]\nlimit = { host_memory = '20' }", "20GiB"),
        ("[groups.lab]\nmembers = 'ann'", "group 'lab'"),
        ("half_life = '7 moons'", "half_life"),
        ("[groups.lab]\nidle = { below = 5, afer = '1h' }", "did you mean `after`?"),
        ("[groups.lab]\nidle = { action = 'kill' }", "idle of group 'lab'"),
        ("groups", "no TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(GroupTextError) as refused:
        parse_file(text)
    assert said in str(refused.value)


def test_amounts_are_read_as_they_are_written() -> None:
    text = "H100=16,*=0.5,cpus=64,host_memory=512GiB"
    assert format_amounts(parse_amounts(text)) == text
    assert parse_amounts("  ") == Resources()
    for wrong in ("H100", "H100=x", "=3", "cpus=1,cpus=2", "H100=-1"):
        with pytest.raises(GroupTextError):
            parse_amounts(wrong)


def test_a_difference_names_what_is_new_gone_and_changed() -> None:
    before = GroupTree(
        groups=[Group(name="lab", members=["ann", "zoe"]), Group(name="old", members=[f"o{n}" for n in range(10)])]
    )
    after = GroupTree(
        groups=[
            Group(name="lab", guarantee=Resources(gpus={"H100": 2}), members=["ann", "ben"]),
            Group(name="new", weight=2.0, idle=IdleRule(below_percent=5, action=IdleAction.END)),
        ],
        half_life_seconds=86400.0,
    )
    assert [
        (one.sign, one.name, [" ".join(line.split()) for line in one.lines]) for one in differences(before, after)
    ] == [
        ("~", "half_life", ["7d → 1d"]),
        ("~", "lab", ["guarantee none → H100=2", "members +ben -zoe"]),
        ("+", "new", ["weight 2", "idle below 5% for 30m: end after 10m"]),
        ("-", "old", ["weight 1", "members o0 o1 o2 o3 o4 o5 o6 o7 2 more"]),
    ]
    assert differences(after, after) == []


def names(listing: Any) -> list[str]:
    return [status["group"]["name"] for status in listing["groups"]]


def test_groups_are_set_shown_declared_and_deleted(cluster: LocalCluster, tmp_path: Path) -> None:
    try:
        set_and_shown(cluster)
        declared(cluster, tmp_path)
        taken_over_from_auth(cluster, tmp_path)
    finally:  # other tests share the cluster
        cluster.corral("group", "apply", "/dev/null")
    assert names(cluster.json("group", "list")) == ["default"]


def corral(cluster: LocalCluster, *arguments: str, code: int = 0) -> str:
    done = cluster.corral("group", *arguments)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def set_and_shown(cluster: LocalCluster) -> None:
    assert names(cluster.json("group", "list")) == ["default"]
    vision = ("set", "lab/vision", "--guarantee", "*=2,cpus=8", "--limit", "B900=1")
    assert "+ lab/vision" in corral(cluster, *vision, "--dry-run")
    assert names(cluster.json("group", "list")) == ["default"]
    assert "no device of the fleet matches 'B900'" in corral(cluster, *vision, "--members", "tester, ann")
    more = ("--add-member", "ben", "--remove-member", "ann", "--weight", "2")
    assert "+ben -ann" in corral(cluster, "set", "lab/vision", *more)
    group = cluster.json("group", "show", "lab/vision")["groups"][0]["group"]
    assert (group["members"], group["weight"], group["guarantee"]["cpus"]) == (["tester", "ben"], 2.0, 8.0)
    assert group["limit"]["gpus"] == {"B900": 1.0}
    assert "no changes" in corral(cluster, "set", "lab/vision", "--weight", "2")
    assert "idle" in corral(cluster, "set", "lab/vision", "--idle", "below 5% for 1h: end")
    assert "below 5% for 1h: end after 10m" in corral(cluster, "show", "lab/vision")
    assert "below 5% for 1h: end after 10m → none" in corral(cluster, "set", "lab/vision", "--idle", "")

    lease = cluster.json("request", "--gpus", "1", "--share", "0.5", "--cpus", "1")["lease"]["lease_id"]
    shown = corral(cluster, "show", "lab")
    assert "2 guaranteed, 0 borrowed" in shown
    [line] = [line for line in shown.splitlines() if line.startswith("lab/vision")]
    assert line.split()[1:6] == ["2", "2", "0.5", "0", "0"]
    assert line in corral(cluster, "list")
    cluster.corral("release", lease)

    for command, code, said in (
        (("set", "x", "--members", "ben"), 2, "'ben' is in two groups"),
        (("set", "lab/vision", "--limit", "*=1"), 2, "--limit: 'lab/vision'"),
        (("set", "lab/vision", "--limit", "*"), 2, "--limit: '*' is no amount"),
        (("set", "lab/vision", "--remove-member", "x"), 5, "x is no member of lab/vision"),
        (("show", "nobody"), 5, "There is no group 'nobody'"),
        (("delete", "nobody"), 5, "There is no group 'nobody'"),
        (("apply",), 2, "--members-from-auth"),
        (("set", "lab", "--weight", "nan"), 2, "--weight: nan: Expected a number of at least 0.000001"),
        (("set", "lab", "--weight", "inf"), 2, "--weight: inf: Expected a number of at most 1000000"),
        (("set", "lab", "--weight", "-1"), 2, "--weight: -1: Expected a number of at least 0.000001"),
    ):
        assert said in corral(cluster, *command, code=code)


def declared(cluster: LocalCluster, tmp_path: Path) -> None:
    file = tmp_path / "groups.toml"
    file.write_text(corral(cluster, "export"))
    assert "no changes" in corral(cluster, "apply", str(file))
    file.write_text(file.read_text().replace("weight = 2", "weight = 3") + '\n[groups.nlp]\nmembers = ["cat"]\n')
    planned = corral(cluster, "apply", str(file), "--dry-run")
    assert "2 → 3" in planned
    assert "+ nlp" in planned
    assert names(cluster.json("group", "list")) == ["default", "lab", "lab/vision"]
    assert names(cluster.json("group", "apply", str(file))) == ["default", "lab", "lab/vision", "nlp"]
    file.write_text("[groups.nlp]\nwaight = 2\n")
    assert "did you mean `weight`" in corral(cluster, "apply", str(file), code=2)
    assert "- nlp" in corral(cluster, "delete", "nlp")


def taken_over_from_auth(cluster: LocalCluster, tmp_path: Path) -> None:
    folder = tmp_path / "auth"
    Authority.create(folder)
    for name, where in (("ben", "lab/vision"), ("dora", "lab/vision"), ("eve", "")):
        added = invoke("auth", "add", "requester", name, "--group", where, "--dir", str(folder), url="")
        assert added.returncode == 0, added.stderr
    corral(cluster, "set", "lab", "--members", "dora")
    assert "+dora" in corral(cluster, "apply", "--members-from-auth", "--dir", str(folder))
    found = {status["group"]["name"]: status["group"]["members"] for status in cluster.json("group", "list")["groups"]}
    assert (found["lab"], found["lab/vision"]) == ([], ["tester", "ben", "dora"])
    assert invoke("auth", "group", "eve", "lab/nobody", "--dir", str(folder), url="").returncode == 0
    assert "lab/nobody" in corral(cluster, "apply", "--members-from-auth", "--dir", str(folder), code=2)


def test_a_user_has_a_group_by_the_authority(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "auth")
    authority.add(Role.VIEWER, "vera")

    def auth(*arguments: str) -> Any:
        return invoke("auth", *arguments, "--dir", str(authority.folder), url="")

    users = tmp_path / "users.toml"
    users.write_text('[alice]\nrole = "requester"\ngroup = "lab/vision"\n')
    assert auth("apply", str(users)).returncode == 0
    users.write_text(users.read_text().replace("vision", "nlp"))
    assert "lab/nlp" in auth("apply", str(users)).stderr
    assert json.loads(auth("show", "alice", "--json").stdout)["user"]["group"] == "lab/nlp"
    for wrong in (
        ("group", "alice", "lab//x"),
        ("group", "vera", "lab"),
        ("add", "operator", "o", "--owner", "*", "--group", "x"),
    ):
        assert auth(*wrong).returncode == 2
    assert auth("group", "alice", "").returncode == 0
    assert "group" not in auth("show", "alice").stdout.splitlines()[0]
