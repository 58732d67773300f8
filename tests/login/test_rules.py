"""Rules from claims to people, as a pure function, and the files that they are in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from corral.bus.access.roles import Role
from corral.login.groups import with_member
from corral.login.rules import LoginRefused, Person, Rules, RulesError, person, read_rules
from corral.schemas.work.groups import Group
from hypothesis import given
from hypothesis import strategies as st

RULES = Rules(
    issuer="https://id.example",
    client_id="corral",
    roles={"admins": Role.OPERATOR, "users": Role.REQUESTER, "guests": Role.VIEWER},
    groups={"vision": "lab/vision", "speech": "lab/speech"},
)


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"groups": ["users", "speech", "vision"]}, Person(owner="ann", role=Role.REQUESTER, group="lab/vision")),
        ({"groups": ["guests", "admins"]}, Person(owner="ann", role=Role.OPERATOR)),
        ({"groups": "guests"}, Person(owner="ann", role=Role.VIEWER)),
    ],
)
def test_the_role_with_the_most_permissions_and_the_first_group_count(claims: dict[str, Any], expected: Person) -> None:
    assert person({"preferred_username": "ann", **claims}, RULES) == expected


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"preferred_username": "ann"}, "no claim 'groups'"),
        ({"preferred_username": "ann", "groups": ["others"]}, "you are in others"),
        ({"groups": ["users"]}, "does not say your preferred_username"),
        ({"preferred_username": "a b", "groups": ["users"]}, "can't be the name of an owner"),
        ({"preferred_username": "*", "groups": ["users"]}, "can't be the name of an owner"),
        ({"preferred_username": "ann.>", "groups": ["users"]}, "can't be the name of an owner"),
        ({"preferred_username": "a..b", "groups": ["users"]}, "empty part"),
        ({"preferred_username": ["ann"], "groups": ["users"]}, "does not say"),
    ],
)
def test_claims_that_name_nobody_are_refused_with_what_to_do(claims: dict[str, Any], message: str) -> None:
    with pytest.raises(LoginRefused, match=message.replace("*", r"\*")):
        person(claims, RULES)


def test_an_address_counts_once_it_is_verified_and_groups_may_lie_deeper() -> None:
    rules = Rules(
        issuer="https://id.example",
        client_id="c",
        owner_claim="email",
        groups_claim="realm_access.roles",
        roles={"x": Role.VIEWER},
    )
    claims: dict[str, Any] = {"email": "ann@lab.example", "realm_access": {"roles": ["x"]}}
    with pytest.raises(LoginRefused, match="has not verified"):
        person(claims, rules)
    assert person({**claims, "email_verified": True}, rules).owner == "ann@lab.example"


@given(st.lists(st.sampled_from(["users", "admins", "guests", "vision", "speech", "x"])), st.text())
def test_nobody_gets_a_role_that_no_group_of_theirs_has(groups: list[str], name: str) -> None:
    try:
        found = person({"preferred_username": name, "groups": groups}, RULES)
    except LoginRefused:
        return
    assert found.owner == name
    assert any(RULES.roles.get(group) is found.role for group in groups)
    assert found.group == "" or any(RULES.groups.get(group) == found.group for group in groups)


def test_the_rules_in_the_documentation_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "login.md").read_text()
    file = tmp_path / "login.toml"
    file.write_text(page.partition("```toml\n")[2].partition("```")[0].replace("# ", ""))
    rules = read_rules(file)
    assert rules.roles == {"gpu-operators": Role.OPERATOR, "gpu-users": Role.REQUESTER, "*": Role.VIEWER}
    assert rules.client_secret_file
    assert list(rules.groups) == ["vision-team", "speech-team"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('issuer = "http://id.example"\nclient_id = "c"', "use an https:// URL"),
        ('issuer = "https://id.example"', "client_id"),
        ('issuer = "https://id.example"\nclient_id = "c"\nrole = 1', "role"),
        ('issuer = "https://id.example"\nclient_id = "c"\nscopes = ["email"]', "openid"),
        ('issuer = "https://id.example"\nclient_id = "c"\n[roles]\nx = "planner"', "people can be viewer"),
        ('issuer = "https://id.example"\nclient_id = "c"\n[roles]\nx = "king"', "king"),
    ],
)
def test_rules_that_are_wrong_are_refused_with_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "login.toml"
    file.write_text(text)
    with pytest.raises(RulesError, match=message):
        read_rules(file)


_MEMBERS = st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from(["ann", "ben"]), unique=True))


@given(_MEMBERS, st.sampled_from(["", "a", "b"]), st.sets(st.sampled_from("abcd")))
def test_an_owner_is_in_one_group_and_others_stay_where_they_are(
    tree: dict[str, list[str]], group: str, managed: set[str]
) -> None:
    before = {name: Group(name=name, members=members) for name, members in tree.items()}
    changed = {found.name: found for found in with_member(before.values(), "ann", group, managed)}
    after = before | changed
    assert with_member(after.values(), "ann", group, managed) == []
    assert [name for name, found in after.items() if "ann" in found.members and (group or name in managed)] == (
        [group] if group in after else []
    )
    for name, found in after.items():
        assert [member for member in found.members if member != "ann"] == [
            m for m in before[name].members if m != "ann"
        ]
