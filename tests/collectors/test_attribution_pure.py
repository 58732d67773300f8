"""Processes joined to leases, and what is told of those that keep to none: the pure core."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from corral.collectors.processes.attribution import attribute, follow
from corral.schemas.requests import Grant, Lease, LeaseState
from corral.schemas.telemetry import AttributionKind, ProcessSample, Severity
from hypothesis import given
from hypothesis import strategies as st

NOW = datetime.now(UTC)
MEMORY, WITHOUT = AttributionKind.LEASE_MEMORY_EXCEEDED, AttributionKind.PROCESS_WITHOUT_LEASE


def lease(name: str, *devices: str, memory: int = 0, share: float = 0.5, holder: str = "") -> Lease:
    return Lease(
        lease_id=name,
        owner=f"owner-of-{name}",
        state=LeaseState.ACTIVE,
        granted_at=NOW,
        expires_at=NOW,
        ttl_seconds=60,
        grants=[Grant(host="h", device=device, memory_bytes=memory, share=share) for device in devices],
        holder=holder,
    )


def process(device: str, pid: int = 1, lease: str = "", memory: int | None = 1, **more: Any) -> ProcessSample:
    return ProcessSample(device=device, pid=pid, lease=lease, memory_used_bytes=memory, **more)


def leases_of(*args: Any, **kwargs: Any) -> list[str]:
    return [found.lease for found in attribute(*args, **kwargs)[0]]


def test_a_process_belongs_to_the_lease_of_its_environment_its_holder_or_its_container() -> None:
    held = [lease("a", "d1", holder="boot/10/5"), lease("b", "d2", holder="boot/10/5"), lease("c", "d3")]
    tree = {20: ["boot/20/9", "boot/10/5", "boot/1/0"], 21: ["boot/21/9", "boot/10/6"]}
    # The holder has two leases: on each device it is the one that holds it.
    assert leases_of([process("d1", 20), process("d2", 20), process("d1", 21)], held, tree) == ["a", "b", ""]
    # Its own environment goes before its descent, unless that lease does not hold the device.
    assert leases_of([process("d1", 20, "c"), process("d3", 20, "c")], held, tree) == ["a", "c"]
    # One in a container whose others all work under one lease; in a container of two leases, nobody knows.
    inside = [process("d3", 30, "c", container="x"), process("d3", 31, container="x"), process("d3", 32)]
    assert leases_of(inside, held) == ["c", "c", ""]
    assert leases_of([*inside, process("d1", 33, "a", container="x")], held) == ["c", "", "", "a"]
    assert leases_of(inside, held, shared={"x"}) == ["c", "", ""]
    # What it says of itself stays where nobody knows better.
    assert leases_of([process("d1", 40, "ended-long-ago")], held, tree) == ["ended-long-ago"]


def test_what_no_lease_covers_is_found_and_weighed() -> None:
    held = [lease("a", "d1", memory=100), lease("w", "d2", memory=100, share=1.0), lease("n", "d3")]
    found = attribute(
        [
            process("d1", 1, "a", 60),
            process("d1", 2, "a", 50),
            process("d1", 3, "a", None),
            process("d2", 4, "w", 150),  # it has the device to itself, all of it
            process("d3", 5, "n", 10**12),  # no memory was asked for: it has what there is
            process("d1", 6, "", 7, name="python3", user="eve"),
            process("d9", 7, "", None),
            process("d2", 8, "a", 9),  # its lease is for another device
            process("d1", 9, "", 7, kind="graphics"),
            process("d1", 10, "", 7, name="nvidia-cuda-mps-server"),
        ],
        held,
    )[1]
    told = {(v.kind, v.device, v.lease, v.pid): (v.severity, v.memory_used_bytes) for v in found}
    assert told == {
        (MEMORY, "d1", "a", 0): (Severity.APPLICATION, 110),
        (WITHOUT, "d1", "", 6): (Severity.APPLICATION, 7),
        (WITHOUT, "d9", "", 7): (Severity.INFO, None),
        (WITHOUT, "d2", "a", 8): (Severity.APPLICATION, 9),
    }
    by_pid = {violation.pid: violation.message for violation in found}
    assert "python3 (pid 6, eve)" in by_pid[6]
    assert "lease a does not hold it" in by_pid[8]
    assert attribute([process("d1", 2, "a", 100)], held)[1] == [], "to the byte what was granted is within it"


NAMES = st.sampled_from(["", "l0", "l1", "l2", "gone"])
DEVICES = st.sampled_from(["d0", "d1", "d2"])
PROCESSES = st.lists(
    st.builds(
        ProcessSample,
        device=DEVICES,
        pid=st.integers(1, 6),
        lease=NAMES,
        memory_used_bytes=st.none() | st.integers(0, 50),
        container=st.sampled_from(["", "x", "y"]),
        kind=st.sampled_from(["compute", "graphics", "both"]),
    ),
    max_size=8,
)
LEASES = st.lists(
    st.builds(
        lambda number, devices, memory, share, holder: lease(
            f"l{number}", *devices, memory=memory, share=share, holder=holder
        ),
        st.integers(0, 2),
        st.sets(DEVICES, max_size=3),
        st.integers(0, 60),
        st.sampled_from([0.5, 1.0]),
        st.sampled_from(["", "p1", "p2"]),
    ),
    max_size=3,
    unique_by=lambda one: one.lease_id,
)
ANCESTRY = st.dictionaries(st.integers(1, 6), st.lists(st.sampled_from(["p1", "p2", "p3"]), max_size=3))


@given(PROCESSES, LEASES, ANCESTRY)
def test_every_process_is_covered_or_told_and_nothing_is_lost(
    processes: list[ProcessSample], leases: list[Lease], ancestry: dict[int, list[str]]
) -> None:
    attributed, violations = attribute(processes, leases, ancestry)
    place = [(one.device, one.pid, one.memory_used_bytes, one.kind) for one in processes]
    assert [(one.device, one.pid, one.memory_used_bytes, one.kind) for one in attributed] == place
    held = {(one.lease_id, grant.device): grant for one in leases for grant in one.grants}
    active = {one.lease_id for one in leases}
    for before, after in zip(processes, attributed, strict=True):
        assert after.lease in active or after.lease == before.lease
        if (before.lease, before.device) in held:
            assert after.lease == before.lease
        told = [v for v in violations if v.kind is WITHOUT and (v.device, v.pid) == (after.device, after.pid)]
        covered = (after.lease, after.device) in held
        assert covered or after.kind == "graphics" or any(v.lease == after.lease for v in told)
    for one in (v for v in violations if v.kind is MEMORY):
        mine = [p.memory_used_bytes or 0 for p in attributed if (p.lease, p.device) == (one.lease, one.device)]
        assert one.memory_used_bytes == sum(mine) > held[one.lease, one.device].memory_bytes > 0
    for (name, device), grant in held.items():
        used = sum(p.memory_used_bytes or 0 for p in attributed if (p.lease, p.device) == (name, device))
        beyond = used > grant.memory_bytes > 0 and grant.share < 1
        assert beyond == any(v.key == f"memory/{device}/{name}" for v in violations)
    assert all(v.severity in (Severity.INFO, Severity.APPLICATION) for v in violations), "no matter of health"


@given(
    st.lists(st.tuples(st.integers(1, 20), st.sets(st.integers(1, 3)), st.integers(0, 9)), max_size=40),
    st.sampled_from([0, 10, 30]),
)
def test_each_begin_and_each_end_is_told_once_and_only_after_the_grace_time(
    steps: list[tuple[int, set[int], int]], grace: int
) -> None:
    known: dict[str, Any] = {}
    now = 1000
    seen: dict[int, list[tuple[int, bool]]] = {pid: [] for pid in (1, 2, 3)}
    open_: set[str] = set()
    for seconds, pids, memory in steps:
        now += seconds
        violations = attribute([process("d", pid, "", memory) for pid in sorted(pids)], [])[1]
        known, notices = follow(known, violations, now, grace)
        for pid, past in seen.items():
            past.append((now, pid in pids))
        for notice in notices:
            key, pid = notice.watched.violation.key, notice.watched.violation.pid
            past = seen[pid]
            unbroken = [at for at, there in past if there != past[-1][1]]
            start = max(unbroken, default=0)  # the last time that it was the other way
            length = now - next(at for at, _ in past if at > start)
            if notice.ended:
                open_.remove(key)
                assert not past[-1][1]
                assert notice.watched.until == start
                assert now - start >= grace
            else:
                assert key not in open_
                open_.add(key)
                assert past[-1][1]
                assert length >= grace
        assert open_ == {key for key, watched in known.items() if watched.reported}
    # Nothing is owed: whoever is there for the grace time is told of, whoever is gone for it is not kept.
    for pid, past in seen.items():
        broken = max((at for at, there in past if there != past[-1][1]), default=0) if past else 0
        run = [at for at, _ in past if at > broken]
        told = f"free/d/{pid}/0" in open_
        if past and past[-1][1] and run[-1] - run[0] >= grace:
            assert told
        if past and not past[-1][1] and now - broken >= grace:
            assert not told


def test_what_is_told_at_the_end_is_the_worst_that_was_seen() -> None:
    known: dict[str, Any] = {}
    notices = []
    for now, memory in ((0, 5), (10, 9), (20, None), (30, 2)):
        known, told = follow(known, attribute([process("d", 1, "", memory)], [])[1], now, 10)
        notices += told
    known, told = follow(known, [], 40, 10)
    [begin, end] = [*notices, *told]
    assert (begin.ended, begin.watched.since, begin.watched.until) == (False, 0, 10)
    assert (end.ended, end.watched.since, end.watched.until) == (True, 0, 30)
    assert end.watched.violation.memory_used_bytes == 9
    assert known == {}
