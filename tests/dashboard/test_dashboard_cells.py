"""Encoding of devices for the heat map, by properties."""

from __future__ import annotations

import base64
import struct
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from corral.client.fleet_view import DeviceState, device_state
from corral.dashboard import cells
from corral.dashboard.cells import GroupBy, Metric
from corral.dashboard.history import Window, source
from corral.dashboard.periods import narrowed, period_of
from corral.dashboard.view_queries import Drawing, cell, draw, guess, spoken, with_times, zones_of
from corral.schemas.operations import DeviceStatus
from corral.schemas.requests import Grant, Lease, LeaseState
from hypothesis import given, settings
from hypothesis import strategies as st

numbers = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(-50, 250))
INDIA = ZoneInfo("Asia/Kolkata")
OWNERS = {"l1": "alice", "l2": "bob", "l3": "alice"}


def lease(lease_id: str) -> Lease:
    now = datetime.now(UTC)
    return Lease(
        lease_id=lease_id, owner=OWNERS[lease_id], state=LeaseState.ACTIVE, granted_at=now, expires_at=now,
        ttl_seconds=60, grants=[Grant(host="h", device="d")],
    )  # fmt: skip


@st.composite
def statuses(draw: st.DrawFn) -> DeviceStatus:
    return DeviceStatus(
        uuid=draw(st.uuids().map(str)),
        host=draw(st.sampled_from(["node-1", "node-2", "node-10"])),
        index=draw(st.integers(0, 100_000)),
        model=draw(st.sampled_from(["", "NVIDIA A100", "NVIDIA H100"])),
        usable=draw(st.booleans()),
        why_not=draw(
            st.lists(st.sampled_from(["stale", "unhealthy", "drained", "mig_parent", "host_lost"]), max_size=2)
        ),
        memory_total_bytes=draw(st.integers(0, 2**40)),
        memory_used_bytes=draw(st.one_of(st.none(), st.integers(0, 2**41))),
        utilization_percent=draw(numbers),
        temperature_celsius=draw(numbers),
        share_free=draw(st.floats(-0.5, 1)),
        leases=draw(st.lists(st.sampled_from(sorted(OWNERS)), max_size=2, unique=True)),
        throttled=draw(st.booleans()),
        drain_reason=draw(st.sampled_from(["", "new fan"])),
        health=draw(st.sampled_from(["", "hardware"])),
    )


def test_a_period_is_a_length_a_month_or_since_a_day_by_the_clocks_of_the_reader() -> None:
    now, berlin = datetime(2026, 11, 30, 12, tzinfo=UTC), ZoneInfo("Europe/Berlin")
    october = period_of("2026-10", now, berlin)
    assert october is not None
    assert (october.start, october.end) == (
        datetime(2026, 9, 30, 22, tzinfo=UTC), datetime(2026, 10, 31, 23, tzinfo=UTC),
    )  # fmt: skip
    assert october == period_of("last-month", now - timedelta(days=20), berlin)
    assert october.before.end == october.start
    week = period_of("2026-W48", now, berlin)
    assert week is not None
    assert (week.start, week.end) == (datetime(2026, 11, 22, 23, tzinfo=UTC), datetime(2026, 11, 29, 23, tzinfo=UTC))
    since = period_of("since-2026-11-30", now, berlin)
    assert since is not None
    assert (since.start, since.end) == (datetime(2026, 11, 29, 23, tzinfo=UTC), now)
    for name in ("", "0s", "nonsense", "2026-13", "since-", "since-2027-01-01", "99999d", "0000-01"):
        assert period_of(name, now, berlin) is None


def test_filters_say_which_of_them_a_question_ignores() -> None:
    period = period_of("2h", datetime(2026, 11, 30, 12, tzinfo=UTC), UTC)
    assert narrowed(("hour", "model"), period, {"owner": "ann", "model": "H100"}).ignored == ["owner"]
    assert guess(["process", "pid", "memory_used_bytes"], [["a", 7, 1], ["b", 8, 2]]) == Drawing(
        kind="bar", label=("process",), values=("memory_used_bytes",), unit="bytes"
    )
    assert [spoken(name) for name in ("gpu_utilization_percent", "memory_used_bytes_p99")] == [
        "GPU utilization", "Memory used p99",
    ]  # fmt: skip


@given(st.binary(max_size=400), st.booleans(), st.data())
def test_an_update_leads_from_one_look_to_the_next(before: bytes, wide: bool, data: st.DataObject) -> None:
    now = data.draw(st.one_of(st.binary(max_size=400), st.binary(min_size=len(before), max_size=len(before))))
    if data.draw(st.booleans()) and before:
        at = data.draw(st.integers(0, len(before) - 1))
        now = before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :]
    update = cells.update(before, now, wide=wide)
    if update is None:
        assert before == now
        return
    shown = bytearray(before)
    if update.full:
        shown = bytearray(base64.b64decode(update.full))
    raw, to = base64.b64decode(update.at), base64.b64decode(update.to)
    positions = struct.unpack(f"<{len(to)}{'I' if wide else 'H'}", raw)
    for number, level in zip(positions, to, strict=True):
        shown[number] = level
    assert bytes(shown) == now or not now
    assert len(update.full) + len(update.at) + len(update.to) <= 4 * len(now) // 3 + 12


@settings(max_examples=40)
@given(st.lists(statuses(), max_size=12), st.sampled_from(list(GroupBy)))
def test_every_device_is_in_one_group_and_has_a_level(devices: list[DeviceStatus], by: GroupBy) -> None:
    leases = [lease(name) for name in OWNERS]
    grouped = cells.groups(devices, leases, by)
    assert sorted(number for group in grouped for number in group.devices) == list(range(len(devices)))
    layout = cells.layout(devices, grouped)
    assert len(base64.b64decode(layout.order)) == 4 * len(devices) == 2 * len(base64.b64decode(layout.indices))
    for metric in Metric:
        levels = cells.levels(devices, [device_state(device) for device in devices], metric)
        assert len(levels) == len(devices)
        assert all(
            level <= (7 if metric is Metric.HEALTH else cells.STEPS) or level == cells.UNKNOWN for level in levels
        )
    for device in devices:
        assert cells.state_words(device)
        assert (device_state(device) is DeviceState.FREE) <= (device.usable and not device.leases)


def test_groups_go_by_numbers_in_names_and_a_filter_asks_for_all_words() -> None:
    def device(host: str, index: int, *held: str, **more: object) -> DeviceStatus:
        return DeviceStatus(uuid=f"GPU-{host}-{index}", host=host, index=index, model="NVIDIA A100", leases=list(held),
                            share_free=0 if held else 1, **more)  # type: ignore[arg-type]  # fmt: skip

    devices = [
        device("node-10", 0),
        device("node-2", 0, "l1"),
        device("node-2", 1, "l1", "l2"),
        device("node-2", 2, "l3"),
    ]
    leases = [lease(name) for name in OWNERS]
    assert [group.label for group in cells.groups(devices, leases, GroupBy.HOST)] == ["node-2", "node-10"]
    by_owner = cells.groups(devices, leases, GroupBy.OWNER)
    assert [(group.label, group.devices) for group in by_owner] == [
        ("alice", [1, 3]), ("alice + bob", [2]), ("not leased", [0]),
    ]  # fmt: skip
    found = cells.groups(devices, leases, GroupBy.MODEL, "a100 Alice node-2")
    assert [group.devices for group in found] == [[1, 2, 3]]
    assert cells.groups(devices, leases, GroupBy.HOST, "node-?? free")[0].devices == [0]


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_any_address_gives_a_window(range: str, start: str, end: str) -> None:
    window = Window.of(range, start, end, "1h")
    first, last = window.bounds
    assert 0 < window.seconds == window.moved(-1).seconds
    assert first < last
    assert source(window.seconds)[0].startswith(("samples", "rollup_"))


def test_a_window_in_the_address_is_the_window_again() -> None:
    window = Window.of("", "1700000000", "1700003600", "1h").moved(-0.5).wider(2)
    again = Window.of("", window.query["from"], window.query["to"], "1h")
    assert (again.seconds, again.end) == (window.seconds, window.end) == (7200, 1700003600)
    assert Window.of("7d", "", "", "1h").query == {"range": "7d"}


times = st.datetimes() | st.datetimes(timezones=st.just(UTC))
json_values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), times)


@settings(max_examples=60)
@given(st.lists(st.lists(json_values, min_size=3, max_size=3), max_size=8))
def test_whatever_a_query_gives_can_be_shown(rows: list[list[object]]) -> None:
    for row in rows:
        for value in row:
            shown = cell(value, INDIA)
            assert shown is None or isinstance(shown, str | int | float)
            assert shown == shown, "JSON has no NaN"
    zones_of(rows, INDIA)
    drawn = draw(["a", "b", "c"], rows, guess(["a", "b", "c"], rows), INDIA)
    if drawn is not None:
        assert all(len(series["values"]) == len(drawn.labels) for series in drawn.series)


def test_times_of_a_result_are_in_the_zone_of_the_reader() -> None:
    winter, summer = datetime(2026, 1, 1, 12, tzinfo=UTC), datetime(2026, 7, 1, 12, tzinfo=UTC)
    berlin = ZoneInfo("Europe/Berlin")
    assert [cell(at, berlin) for at in (winter, summer)] == ["2026-01-01 13:00:00", "2026-07-01 14:00:00"]
    assert cell(datetime(2026, 1, 1, 12), berlin) == "2026-01-01 12:00:00"
    assert zones_of([[winter, 1], [summer, 2]], berlin) == "CEST and CET"
    assert zones_of([[1]], berlin) == ""
    text = [["2026-01-01T12:00:00Z", "2026-01-01T12:00:00Z"], ["infinity", None]]
    typed = with_times(["TIMESTAMP WITH TIME ZONE", "VARCHAR"], text)  # as answers are without pyarrow
    assert typed == [[winter, text[0][1]], ["infinity", None]]
