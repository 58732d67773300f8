"""Invalid requests are refused in words: no regular expression, no type of Python's, and the field with each."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from corral.client import InvalidRequest
from corral.client.request import refuse_not_finite, work_request
from corral.schemas import codec
from corral.schemas.query import QueryRequest
from corral.schemas.requests import CheckpointAction, LeaseAction, WorkRequest
from corral.schemas.values import names
from corral.schemas.work.groups import Group, GroupChange
from corral.schemas.work.windows import WindowAction

WRONG: list[tuple[type, dict[str, Any], str]] = [
    (WorkRequest, {"owner": "a!b"}, "digits and _ @ . : / + - (with none of . : / + first) - at"),
    (WorkRequest, {"owner": "ann", "request_id": "a b"}, "Expected an id of letters, digits, - and _ - at `$.request"),
    (WorkRequest, {"owner": "ann", "min_compute_capability": "x"}, "Expected a version, such as 8.0 - at `$.min_"),
    (GroupChange, {"set": [{"name": "/lab"}]}, "as in lab/vision - at `$.set[0].name`"),
    (GroupChange, {"set": [{"name": "lab", "weight": 0}]}, "a number of at least 0.000001 - at `$.set[0].weight`"),
    (WorkRequest, {"owner": "ann", "gpus": -1}, "Expected a number of at least 0 - at `$.gpus`"),
    (WorkRequest, {"owner": "ann", "gpus": "2"}, "Expected a whole number or an object, got text - at `$.gpus`"),
    (WorkRequest, {"owner": "ann", "name": 2}, "Expected text, got a whole number - at `$.name`"),
    (WorkRequest, {"owner": "ann", "name": "x" * 300}, "Expected text of at most 256 characters - at `$.name`"),
    (WorkRequest, {"owner": "ann", "models": ["x"] * 65}, "Expected a list of at most 64 entries - at `$.models`"),
    (WorkRequest, {"owner": "ann", "grace_seconds": 7200}, "a duration of at most 1h (3600 seconds) - at `$.grace_"),
    (WorkRequest, {"owner": "ann", "wait_seconds": 2e5}, "a duration of at most 1d (86400 seconds) - at `$.wait_"),
    (LeaseAction, {"lease_id": "l", "owner": "ann", "ttl_seconds": 0}, "a duration of at least 1s - at `$.ttl_"),
    (CheckpointAction, {"lease_id": "l", "owner": "ann", "busy_seconds": 0}, "a duration of more than 0s - at `$.busy"),
    (QueryRequest, {"sql": ""}, "Expected text that is not empty - at `$.sql`"),
    (QueryRequest, {"sql": "SELECT 1", "query_id": "?"}, "an id of letters, digits, - and _ - at `$.query_id`"),
    (WindowAction, {"book": {"starts_at": "monday"}}, "such as 2026-01-31T08:00:00Z - at `$.book.starts_at`"),
    (WindowAction, {"book": {"starts_at": "2026-01-31T08:00:00"}}, "a time with its zone, such as"),
]


@pytest.mark.parametrize(("type", "body", "said"), WRONG)
@pytest.mark.parametrize("content_type", [codec.JSON, codec.MSGPACK])
def test_what_is_wrong_is_said_in_words(type: type, body: dict[str, Any], said: str, content_type: str) -> None:
    with pytest.raises(codec.DecodeError) as refused:
        codec.decode_request(codec.encode(body, content_type), type, content_type)
    assert said in str(refused.value)
    assert refused.value.field
    assert f"`{refused.value.field}`" in str(refused.value)


def test_every_pattern_of_the_contract_has_words() -> None:
    patterns = {value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)}
    assert patterns == names.WORDS.keys()


def test_the_client_refuses_a_limit_in_words_and_numbers_that_json_has_not() -> None:
    with pytest.raises(InvalidRequest, match=r"at most 1h \(3600 seconds\) - at `\$.grace_seconds`"):
        work_request("ann", {"grace": "2h"})
    with pytest.raises(InvalidRequest, match="cpus=nan is not a finite number"):
        work_request("ann", {"cpus": float("nan")})
    change = GroupChange(set=[Group(name="lab", weight=float("inf"))])
    with pytest.raises(InvalidRequest, match=r"set\[0\].weight=inf is not a finite number"):
        refuse_not_finite(msgspec.to_builtins(change))
