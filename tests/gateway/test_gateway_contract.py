"""Tokens, paths and the OpenAPI document, without a server."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from corral.bus.access.folder import Authority, make_key
from corral.bus.access.roles import Role
from corral.bus.access.tokens import MAX_TOKEN, TokenError, identity_of_token, token_of
from corral.bus.credentials import Identity, identify
from corral.cli.main import main
from corral.gateway import openapi
from corral.gateway.answers import error_answer
from corral.gateway.attempts import FREE, SECONDS, Attempts
from corral.gateway.guard import hostname
from corral.gateway.routes import ROUTES, message_of
from corral.gateway.waiting import wait_seconds
from corral.schemas import codec
from corral.schemas.operations import LeaseFilter
from corral.schemas.requests import Error
from corral.schemas.work.jobs import JobFilter
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator

FOR_USERS = {
    *("request", "explain", "withdraw", "renew", "release", "checkpoint", "resize", "submit", "job", "job_override"),
    *("drain", "book", "evict", "preempt", "set_groups", "moves", "query", "query_cancel"),
    *("leases", "devices", "fleet", "queue", "jobs", "groups", "windows", "history_status"),
    *("lease_events", "job_events", "logs"),
}
SEED = make_key()[0]


def test_there_is_a_path_for_each_channel_of_users_and_for_no_other() -> None:
    assert {route.name for route in ROUTES.values()} == FOR_USERS
    # What hosts report, and who looks into a machine, stay on the bus.
    subjects = {route.channel.subject for route in ROUTES.values() if route.channel}
    assert not [one for one in subjects if "runner" in one or "attach" in one or "snapshot" in one or "dead" in one]


def test_the_document_is_valid_and_says_who_may_read_it() -> None:
    document: Any = json.loads(openapi.document())
    OpenAPIV31SpecValidator(document).validate()
    assert set(document["paths"]) == set(ROUTES)
    assert document["security"] == [{"token": []}]
    work = document["components"]["schemas"]["WorkRequest"]
    assert "gpus" in work["properties"]
    assert "owner" not in work.get("required", ()), "the token says it"
    states = next(one for one in document["paths"]["/v1/leases"]["get"]["parameters"] if one["name"] == "states")
    assert "released" in states["schema"]["items"]["enum"]


def test_a_token_is_its_credentials_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority.create(tmp_path / "auth")
    authority.add(Role.REQUESTER, "alice", owner="team.a")
    authority.add(Role.REQUESTER, "portal", owner="*")
    identity = identify(str(authority.credentials("alice")))
    found = identity_of_token(token_of(identity))
    assert (found.user, found.owner, found.seed, found.role) == ("alice", "team.a", identity.seed, "requester")
    assert identity.seed not in repr(found)

    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["auth", "token", *arguments])
        return "".join(capsys.readouterr())

    folder = ("--dir", str(authority.folder))
    assert printed("alice", *folder, "--header") == f"Authorization: Bearer {token_of(identity)}\n"
    monkeypatch.setenv("CORRAL_NATS_CREDS", str(authority.credentials("portal")))
    assert identity_of_token(printed("--owner", "carol").strip()).owner == "carol"
    for arguments, words in (
        (["alice", "--owner", "bob"], "not for bob"),
        (["portal", "--owner", "a.>"], "can't stand in a token"),
        (["nobody"], "there is no user"),
    ):
        assert words in printed(*arguments, *folder)


@given(st.text(max_size=80) | st.text("corl_AZaz09-_=", max_size=200).map("corral_".__add__))
def test_what_is_no_token_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(TokenError) as refused:
        identity_of_token(text)
    assert len(text) < 12 or text not in str(refused.value)


@given(st.integers(0, 57), st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"))
def test_a_mistyped_key_is_noticed(at: int, letter: str) -> None:
    seed = SEED[:at] + letter + SEED[at + 1 :]
    identity = Identity(user="alice", seed=seed)
    if seed == SEED:
        assert len(token_of(identity)) < MAX_TOKEN
    else:
        with pytest.raises(TokenError):
            token_of(identity)


@given(st.binary(max_size=200) | st.text("abcdefowner&=+%1;", max_size=60).map(str.encode))
def test_any_query_string_becomes_a_message_or_an_error(query: bytes) -> None:
    for type in (LeaseFilter, JobFilter):
        with contextlib.suppress(codec.DecodeError):
            codec.decode_request(message_of(query, type), type)


def test_parameters_of_a_url_are_the_fields_of_the_message() -> None:
    sent = message_of(b"owner=team.a&states=released&states=expired&limit=5&hosts=a%2Ab&offset=0", LeaseFilter)
    wanted, warnings = codec.decode_request(sent, LeaseFilter)
    assert (wanted.owner, wanted.states, wanted.limit, wanted.hosts) == ("team.a", ("released", "expired"), 5, ["a*b"])
    assert warnings == []
    jobs, _ = codec.decode_request(message_of(b"active=true&job_ids=12&indexes=3&tasks=1", JobFilter), JobFilter)
    assert (jobs.active, jobs.job_ids, jobs.indexes, jobs.tasks) == (True, ["12"], [3], True)


def test_errors_have_the_status_of_their_code() -> None:
    for code, status in (
        ("invalid", 400),
        ("unauthenticated", 401),
        ("not_owner", 403),
        ("refused", 403),
        ("not_found", 404),
        ("slow", 408),
        ("conflict", 409),
        ("impossible", 409),
        ("ended", 410),
        ("too_large", 413),
        ("too_many_requests", 429),
        ("of a later version", 500),
        ("unavailable", 503),
        ("timeout", 504),
    ):
        assert error_answer(Error(code=code, message="")).status == status, code
    after = error_answer(Error(code="too_many_requests", message="", retry_after_seconds=2.1))
    assert after.headers["Retry-After"] == "3"


def test_hosts_and_waits_are_read_from_headers() -> None:
    hosts = {
        "Corral.example:8700": "corral.example",
        "[::1]:80": "::1",
        "127.0.0.1": "127.0.0.1",
        "": "",
        "a:b:c": "a:b:c",
    }
    assert {host: hostname(host) for host in hosts} == hosts
    waits = {"wait=30": 30.0, "respond-async, wait=5": 5.0, "await=3": None, "wait=-1": None, "": None, "wait=x": None}
    assert {text: wait_seconds(text) for text in waits} == waits
    assert wait_seconds(None) is None


def test_wrong_tokens_of_one_network_count_together_and_are_forgotten() -> None:
    attempts = Attempts()
    for number in range(FREE):
        assert attempts.wait_seconds("2001:db8::1", float(number)) == 0
        attempts.failed(f"2001:db8::{number:x}", float(number))
    assert 0 < attempts.wait_seconds("2001:db8::ffff", float(FREE)) <= SECONDS
    assert attempts.wait_seconds("2001:db8:1::1", float(FREE)) == 0
    assert attempts.wait_seconds("2001:db8::1", FREE + SECONDS) == 0
