"""Errors about fields name the options of the command that was typed."""

from __future__ import annotations

from typing import Any

import pytest
from corral.cli.field_options import in_options, name_options, option_of, options_of
from corral.cli.loading import load
from corral.cli.registry import COMMANDS
from corral.client.errors import InvalidRequest
from corral.schemas import codec
from corral.schemas.operations import PreemptAction
from corral.schemas.requests import WorkRequest
from corral.schemas.work.windows import WindowAction
from msgspec.structs import fields

NOON = "2026-12-01T12:00:00Z"


def command(name: str) -> dict[str, str]:
    return options_of(load(name))


@pytest.mark.parametrize(
    ("name", "body", "type", "words"),
    [
        ("request", {"owner": "a", "name": 3}, WorkRequest, "--name: Expected text, got a whole number"),
        (
            "request",
            {"owner": "a", "ttl_seconds": 0},
            WorkRequest,
            "--ttl: Expected a duration of at least 1s",
        ),
        (
            "run",
            {"owner": "a", "placement": "near"},
            WorkRequest,
            "--placement: 'near' is none of same_host, fewest_hosts, spread",
        ),
        (
            "reserve",
            {"book": {"starts_at": NOON, "ends_at": NOON, "reason": "x" * 999}},
            WindowAction,
            "--reason: Expected text of at most 256 characters",
        ),
        ("preempt", {"lease_id": "a b"}, PreemptAction, "LEASE: Expected an id of letters, digits, - and _"),
    ],
)
def test_a_message_that_is_refused_is_about_options(name: str, body: Any, type: Any, words: str) -> None:
    with pytest.raises(codec.DecodeError) as refused:
        codec.decode(codec.encode(body, codec.JSON), type, codec.JSON)
    assert in_options(str(refused.value), refused.value.field, command(name)) == words


def test_what_the_planner_says_of_fields_is_about_options() -> None:
    told = "gpu_share takes part of one device, but gpus is 2: leave gpu_share out, or set gpus to 1"
    assert in_options(told, "$.gpu_share", command("request")).startswith("--share takes part of one device")
    assert "leave --share out" in in_options(told, "$.gpu_share", command("request"))
    moves = "hosts narrows free_hosts: say how many"
    assert in_options(moves, "$.hosts", command("plan-moves")) == "--host narrows --free-hosts: say how many"
    # A command that has no such option says which field it is.
    assert in_options("is odd", "$.unknown", command("request")) == "is odd ($.unknown)"
    assert in_options("all is odd", "", command("request")) == "all is odd"


def test_every_field_of_a_request_has_an_option() -> None:
    options = command("request")
    without = {each.name for each in fields(WorkRequest) if not option_of(f"$.{each.name}", options)}
    # Programs alone name devices, and the process that holds them.
    assert without == {"holder", "devices"}


def test_commands_name_their_options_and_nothing_else_changes() -> None:
    def fails(error: Exception) -> Any:
        made = load("evict")
        made.callback = lambda: (_ for _ in ()).throw(error)
        name_options(made)
        return made

    assert "evict" in COMMANDS
    with pytest.raises(InvalidRequest, match=r"^--reason: too long$") as found:
        fails(InvalidRequest("too long", "invalid", "$.reason")).callback()
    assert (found.value.code, found.value.field) == ("invalid", "")
    with pytest.raises(KeyError, match="reason"):
        fails(KeyError("reason")).callback()
