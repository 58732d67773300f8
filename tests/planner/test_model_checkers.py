"""The checkers of the model check: a sound history passes, and each lie is found."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from corral.schemas.request_events import AskedRequest, RequestEvent, RequestOutcome
from support.elastic_model import Answered, Claim, Closed, ElasticHistory, check_elastic
from support.groups_model import GUESTS, POOL, Claimed, GroupHistory, check_groups
from support.planner_model import ABSENT_SECONDS, HEARD_SECONDS, TRIES_MOST, History, Patience, check, time_of
from support.queue_model import SLOTS, Asked, Outage, QueueHistory, check_queue

START = 1_800_000_000.0


def second_of(second: float) -> str:
    return time_of(START + second)


def lease(lease_id: str, since: int, until: int, **grant: Any) -> dict[str, Any]:
    return {
        "lease_id": lease_id,
        "owner": "ann",
        "request_id": f"r-{lease_id}",
        "granted_at": f"2026-01-01T00:00:{since:02d}Z",
        "expires_at": f"2026-01-01T00:00:{until:02d}Z",
        "ended_at": f"2026-01-01T00:00:{until:02d}Z",
        "grants": [{"host": "a", "device": "G1", "share": 1.0, **grant}],
    }


def test_the_checker_finds_what_it_looks_for() -> None:
    """A sound history passes; each of these lies is found."""

    def story() -> tuple[History, list[dict[str, Any]]]:
        history = History()
        events: list[dict[str, Any]] = []
        for one in (lease("l1", 1, 5), lease("l2", 5, 9)):
            history.answers[one["request_id"]].append({"type": "assignment", "lease": one})
            for kind, time_ in (("granted", one["granted_at"]), ("expired", one["ended_at"])):
                events.append({"kind": kind, "time": time_, "lease": one})
        return history, events

    assert check(*story(), active=[]) == []

    history, events = story()
    events.pop(0)
    assert any("missing" in problem for problem in check(history, events, []))
    history, events = story()
    events.append(copy.deepcopy(events[1]))
    assert any("told twice" in problem for problem in check(history, events, []))
    history, events = story()
    history.answers["r-l1"].append({"type": "rejection"})
    assert any("differ" in problem for problem in check(history, events, []))
    history, events = story()
    history.answers["r-l3"] = history.answers["r-l1"]
    assert any("granted to" in problem for problem in check(history, events, []))
    history, events = story()
    for event in events[2:]:
        event["lease"]["granted_at"] = "2026-01-01T00:00:04Z"
    assert any("share of G1" in problem for problem in check(history, events, []))
    for event in events:
        event["lease"]["grants"][0].update(share=0.5, memory_bytes=60 * 2**30)
    assert any("memory of G1" in problem for problem in check(history, events, []))
    history, events = story()
    times = {
        "starts_at": "2026-01-01T00:00:06Z",
        "ends_at": "2026-01-01T00:00:08Z",
        "booked_at": "2026-01-01T00:00:00Z",
        "devices": ["G1"],
    }
    history.windows = [{"window_id": "w", "owners": ["ann"], **times}]
    assert check(history, events, []) == []
    history.windows[0]["owners"] = ["ben"]
    assert any("in the way" in problem for problem in check(history, events, []))
    history.windows.append({"window_id": "v", "owners": ["ben"], **times})
    assert any("booked for v and w" in problem for problem in check(history, events, []))
    history, events = story()
    history.unanswered.append("request r-l3")
    assert check(history, events, []) == ["request r-l3 was never answered"]
    history, events = story()
    assert any("listed" in problem for problem in check(history, events[:-1], []))


def test_the_checker_of_the_queue_finds_what_it_looks_for() -> None:
    """A sound story of two that wait for one slot passes; each of these lies is found."""

    def ended(request_id: str, second: float, outcome: RequestOutcome, message: str = "") -> RequestEvent:
        at = datetime.fromtimestamp(START + second, UTC)
        request, uid = AskedRequest(owner=request_id[:-2], request_id=request_id), f"{request_id}{second}"
        return RequestEvent(uid=uid, request=request, asked_at=at, ended_at=at, outcome=outcome, message=message)

    def story(
        starts: tuple[float | None, float | None] = (10, 12),
        outcomes: tuple[RequestOutcome, RequestOutcome] = (RequestOutcome.GRANTED, RequestOutcome.GRANTED),
        gone: Sequence[float] = (),
        away: Sequence[Outage] = (),
        owner: str = "short",
        left: Sequence[str] = (),
        **first: Any,
    ) -> list[str]:
        """Both ask every second, the second of them two seconds later."""
        asked: dict[str, Asked] = {}
        for number, (name, since) in enumerate((("long", 0), (owner, 2)), 1):
            asks = [START + since + at for at in range(20)]
            asked[f"{name}-{number}"] = Asked(name, SLOTS[0], None, asks[0], asks[0] + 0.5, asks=asks)
        ahead = asked["long-1"]
        for field, value in first.items():
            setattr(ahead, field, [START + at for at in value] if field == "asks" else START + value)
        events = [
            {"kind": "granted", "lease": {"request_id": request_id, "granted_at": second_of(at)}}
            for request_id, at in zip(asked, starts, strict=True)
            if at is not None
        ]
        ends = [ended(request_id, 20, outcome) for request_id, outcome in zip(asked, outcomes, strict=True)]
        ends += [ended("long-1", at, RequestOutcome.GONE, "it was not heard for 4 s") for at in gone]
        return check_queue(QueueHistory(asked, list(away)), events, ends, left)

    withdrawn = (RequestOutcome.WITHDRAWN, RequestOutcome.GRANTED)
    assert story() == []
    assert any("bound" in one for one in story(starts=(12, 10)))
    assert any("order" in one for one in story(starts=(4, 3), owner="long"))
    assert any("ghost: x" in one for one in story(left=["x"]))
    assert any("had gone" in one for one in story(gone_at=3))
    assert any("was rejected" in one for one in story(rejected_at=9))
    assert any("has no event" not in one and "history" in one for one in story(outcomes=withdrawn))
    # Nothing was ahead of the second any more, though the client of the first learned that only after an outage.
    late = {"withdrawn_at": 9.0, "rejected_at": 34.0}
    assert story(starts=(None, 10), outcomes=withdrawn, **late) == []
    assert any("bound" in one for one in story(starts=(None, 8), outcomes=withdrawn, **late))
    assert any("bound" in one for one in story(starts=(12, 10), withdrawn_at=9))
    # Who was silent is out of line until heard again; who was not is not.
    assert story(starts=(12, 10), asks=(0, 1, 2, 3, 4, 8.5), gone=(8.1,)) == []
    assert any("silence" in one for one in story(starts=(12, 10), gone=(8.1,)))
    assert story(starts=(12, 10), gone=(8.1,), away=[Outage(START + 6, START + 8)]) == []


def test_who_finds_nobody_there_has_not_been_left_without_an_answer() -> None:
    """Planners that all start anew are waited for; none that hears, and none that never comes, gets away with it."""

    def tries(count: int, seconds: float, *, heard: bool, since: Patience | None = None) -> tuple[Patience, bool]:
        patience = since or Patience(0.0)
        over = [patience.over(patience.looked_at + seconds, heard) for _ in range(count)]
        return patience, any(over)

    away, over = tries(TRIES_MOST + 10, 0.12, heard=False)
    assert not over
    assert not tries(TRIES_MOST - 1, 1.6, heard=True, since=away)[1]
    assert tries(1, 1.6, heard=True, since=away)[1]
    # One that says `unavailable` at once may have its reasons for longer than so many tries take.
    assert not tries(TRIES_MOST + 10, 0.12, heard=True)[1]
    assert tries(math.ceil(HEARD_SECONDS / 0.12) + 1, 0.12, heard=True)[1]
    assert tries(math.ceil(ABSENT_SECONDS / 0.12) + 1, 0.12, heard=False)[1]


def test_the_checker_of_groups_finds_what_it_looks_for() -> None:
    """A sound story of a claim passes; each of these lies is found."""

    def event(kind: str, second: float, lease: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {"kind": kind, "time": second_of(second), "lease": {**lease, **fields}}

    def held(lease_id: str, owner: str, since: float, device: int, **fields: Any) -> dict[str, Any]:
        lease = {
            "lease_id": lease_id,
            "owner": owner,
            "request_id": f"r-{lease_id}",
            "granted_at": second_of(since),
            "grants": [{"host": POOL[0], "device": f"GPU-{POOL[0]}-{device}"}],
            "preemptible": True,
            "grace_seconds": 2,
            "min_run_seconds": 1,
            "saved_at": None,
            "preemption": None,
            "state": "active",
        }
        return {**lease, **fields}

    def story(
        notified: float = 20,
        noticed: float = 22,
        started: float = 22,
        victims: int = 1,
        claim: dict[str, Any] | None = None,
        usage: float | None = None,
        granted: bool = True,
        withdrawn: float = math.inf,
        left: float | None = None,
        unseen: float = 0,
        away: Sequence[Outage] = (),
        **victim: Any,
    ) -> list[str]:
        guests = [held(f"g{at}", f"guest{at}", 2, at, **victim) for at in range(4)]
        notice = {"notified_at": second_of(notified), "claimant": "r-v", "claimant_owner": "vision0"}
        ended = {"preemption": notice, "state": "evicted", "ended_at": second_of(noticed)}
        events = [event("granted", 2, guest) for guest in guests]
        events += [event("preempting", notified, guest, preemption=notice) for guest in guests[:victims]]
        events += [event("evicted", noticed, guest, **ended) for guest in guests[:victims]]
        events += [event("granted", started, held("v", "vision0", started, 0))] * granted
        if unseen:  # the group has all that it is guaranteed, until somebody sees that this lease has ended
            other = held("w", "vision1", 2, 0, grants=[{"host": POOL[1], "device": f"GPU-{at}"} for at in range(3)])
            events.insert(0, event("granted", 2, other))
            events.append(event("expired", unseen, other, state="expired", ended_at=second_of(18)))
        events += [event("released", 40, guest, state="released", ended_at=second_of(40)) for guest in guests[victims:]]
        body = {"owner": "vision0", "hosts": ["pool0"], "gpus": 1, **(claim or {})}
        asked = Claimed(body, START + 19, START + 19, START + started, START + withdrawn)
        groups = GroupHistory({"r-v": asked}, [], START)
        if usage is not None:
            answer = {"groups": [{"group": {"name": GUESTS}, "usage": usage}]}
            groups.usage = [(START + 22, START + 22, answer)]
        return check_groups(groups, events, away, (8.0, 64.0, 1.0), {} if left is None else {"r-v": [START + left]})

    assert story(usage=1.0) == []
    assert any("usage: guests" in one for one in story(usage=0.98))
    assert any("gave way" in one for one in story(notified=28, noticed=30, started=30))
    # Nobody gave way. That is right once the wait was over, though its client learned that late.
    nobody = {"victims": 0, "started": 30, "granted": False}
    assert any("gave way" in one for one in story(**nobody))
    assert any("gave way" in one for one in story(**nobody, withdrawn=23))
    assert story(**nobody, withdrawn=21) == story(**nobody, claim={"wait_seconds": 2}) == []
    assert any("left the queue" in one for one in story(**nobody, left=21))
    assert story(**nobody, left=21, away=[Outage(START + 19, START + 20)]) == []
    assert any("gave way" in one for one in story(**nobody, unseen=26))
    assert story(**nobody, unseen=28) == []
    two = [{"host": POOL[0], "device": "d"}, {"host": POOL[0], "device": "e"}]
    assert any("limit: guests" in one for one in story(grants=two))
    assert any("not preemptible" in one for one in story(preemptible=False))
    assert any("s after its grant" in one for one in story(min_run_seconds=18.5))
    assert any("s after its notice" in one for one in story(grace_seconds=3))
    assert any("did not wait" in one for one in story(notified=18))
    assert any("nobody asked" in one for one in story(claim={"owner": "ops0"}))
    assert any("cascade" in one for one in story(claim={"requeue_of": "x"}))
    assert any("beyond its guarantee" in one for one in story(claim={"gpus": 6}))
    assert any("had gone" in one for one in story(noticed=30))
    assert any("may use" in one for one in story(claim={"hosts": ["pool1"]}))
    assert any("not enough" in one for one in story(claim={"gpus": 2}))
    assert any("is not needed" in one for one in story(victims=2))


def test_the_checker_of_elastic_leases_windows_and_drains_finds_what_it_looks_for() -> None:
    """A sound story of an offer and of a request to give back passes; each of these lies is found."""
    owners = {"owner": "ann", "preemptible": False, "grace_seconds": 1, "preemption": None, "ends_at": None}

    def notice(number: int, kind: str, second: float, devices: str) -> dict[str, Any]:
        ends = {"notified_at": second_of(second), "ends_at": second_of(second + 30)}
        grants = [{"host": "flex0", "device": device} for device in devices]
        return {"number": number, "kind": kind, "grants": grants, "claimant": "r-ben", **ends}

    def story(
        accepts: Sequence[float] = (4.0, 8.0),
        named: str = "",
        grown: str = "abc",
        returned: str = "c",
        asked: str = "c",
        limits: tuple[int, int] = (1, 3),
        claimed: float | None = None,
        closed: Closed | None = None,
        reply: str = "ab",
        other: float = 9.0,
        away: Sequence[Outage] = (),
        **fields: Any,
    ) -> list[str]:
        lease: dict[str, Any] = {
            "lease_id": "l1",
            "request_id": "r-ann",
            "granted_at": second_of(1),
            **owners,
            **fields,
        }
        lease["elastic"] = {"min": limits[0], "max": limits[1]}
        events: list[dict[str, Any]] = []

        def tell(kind: str, second: float, devices: str, resize: dict[str, Any] | None = None, **rest: Any) -> None:
            now = {**lease, "grants": [{"host": "flex0", "device": device} for device in devices], "resize": resize}
            back = [{"host": "flex0", "device": device} for device in rest.pop("returned", "")]
            events.append({"kind": kind, "time": second_of(second), "lease": {**now, **rest}, "returned": back})

        tell("granted", 1, "ab")
        tell("resize_offered", 3, "ab", notice(2, "offer", 3, "c"))
        tell("resized", 5, grown)
        tell("resize_requested", 7, grown, notice(4, "request", 7, asked))
        tell("resized", 9, "ab", returned=returned)
        tell("released", 20, "ab", ended_at=second_of(20))
        ben = {**lease, **owners, "lease_id": "l2", "request_id": "r-ben", "elastic": None, "resize": None}
        ben |= {"granted_at": second_of(other), "grants": [{"host": "flex0", "device": "c"}], "owner": "ben"}
        events.append({"kind": "granted", "time": second_of(other), "lease": ben})
        ended = {**ben, "ended_at": second_of(12)}
        events.append({"kind": "released", "time": second_of(12), "lease": ended})
        numbers = zip((2, 4), accepts, (named, ""), strict=True)
        answered = [
            Answered({"lease_id": "l1", "number": number, **({"devices": list(some)} if some else {})}, START + at)
            for number, at, some in numbers
        ]
        answered[1].answered_at = START + 9.5
        grants = [{"host": "flex0", "device": device} for device in reply]
        answered[1].reply = {"type": "lease", "lease_id": "l1", "state": "active", "grants": grants}
        history = ElasticHistory({"r-ben": START + 6.0}, answered, [closed] if closed else [])
        if claimed is not None:
            times = {"starts_at": second_of(claimed), "ends_at": second_of(30), "booked_at": second_of(0)}
            history.claims.append(Claim({"devices": ["c"], **times}, "r-ben", START))
        return check_elastic(history, events, [], away) + check(History(), events, [])

    assert story() == []
    assert any("did not agree" in one for one in story(accepts=(6.0, 8.0)))
    assert any("did not agree" in one for one in story(named="d"))
    assert any("did not agree" in one for one in story(grown="abd"))
    assert any("leaves 3 devices" in one for one in story(limits=(1, 2)))
    assert any("in addition to" in one for one in story(limits=(1, 2)))
    assert any("has a device twice" in one for one in story(grown="abb"))
    assert any("and says" in one for one in story(returned=""))
    assert any("resize_requested" in one for one in story(limits=(3, 3)))
    assert any("of what l2 holds" in one for one in story(other=2.0))
    assert any("share of c" in one for one in story(other=8.0))
    assert any("no event has" in one for one in story(reply="a"))
    assert any("between" in one for one in story(closed=Closed({"c"}, START + 4.5, START + 5.5)))
    decided_before = Closed({"c"}, START + 4.5, START + 5.5)
    assert story(closed=decided_before, away=[Outage(START + 4, START + 4.95)]) == []
    assert any("between" in one for one in story(closed=decided_before, away=[Outage(START + 4, START + 4.8)]))
    assert any("take no work" in one for one in story(closed=Closed({"c"}, START + 2.5, START + 3.5)))
    assert any("into maintenance" in one for one in story(closed=Closed({"c"}, START + 8, START + 9, START + 4)))
    assert any("being preempted" in one for one in story(preemption={}))
    assert story(claimed=7) == []
    assert any("after the begin" in one for one in story(claimed=5))
