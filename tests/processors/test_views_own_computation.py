"""Each number of the views over leases, hours and devices, against a computation of its own in Polars.

Random histories: midnights, changes of the interval, silences, boards that are split and boards that move, with and
without a counter of energy; leases in any time zone that begin and end anywhere, overlap in shares, are renewed or
never ended.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corral.client.reports import usage_sql
from corral.client.reports.periods import Period, slices
from corral.processors.ingest.columnar import SCHEMA
from corral.processors.storage.embedded import rollups
from corral.processors.storage.embedded.database import Database
from corral.processors.storage.protocol import Batch

pl: Any = None
"""Polars, once a history is asked for: only the workers that compute with it take the second that its import takes."""

NOW = datetime.now(UTC)
START = NOW.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(hours=28)
"""Four hours before a midnight."""
HOURS = 8
SPAN = HOURS * 3600
GIB = 2**30
BOARDS = ("plain", "counter", "moved", "split")
ZONES = (0, 5.5, -8, 14)


def stretches(dice: random.Random) -> list[tuple[int, int]]:
    """Seconds that are known, with silences of seconds to minutes between."""
    found, at = [], dice.randrange(200)
    while at < SPAN:
        end = at + dice.choice((180, 900, 3600, 9000)) + dice.randrange(60)
        found.append((at, min(end, SPAN)))
        at = end + dice.choice((25, 90, 400)) + dice.randrange(60)
    return found


def samples(dice: random.Random) -> Any:
    rows: list[dict[str, Any]] = []
    intervals = [dice.choice((6, 10, 15, 20)) for _ in range(HOURS)]
    leaves = dice.randrange(SPAN // 4, 3 * SPAN // 4)
    for board in BOARDS:
        energy, errors, before = 10**9, 0, 0
        for first, end in stretches(dice):
            load, used = dice.choice((0.0, 3.0, 60.0, 100.0)), dice.randrange(1, 70) * GIB
            at = first
            while at < end:
                step = intervals[at // 3600]
                power = dice.randrange(60, 700)
                energy += 400_000 * (at - before)
                before = at
                errors += dice.random() < 0.01
                host = "h2" if board == "moved" and at >= leaves else "h1"
                common = {"host": host, "at": at, "step": step}
                mask = dice.choice((0, 0, 0x4, 0x20, 0x44, 0x8))
                rows.append(common | {
                    "device": board, "power_watts": power, "memory_used_bytes": used, "memory_total_bytes": 80 * GIB,
                    "gpu_utilization_percent": None if board == "split" else load, "throttle_reasons_bitmask": mask,
                    "energy_millijoules": energy if board == "counter" else None, "ecc_uncorrected_count": errors,
                })  # fmt: skip
                if board == "split":
                    rows.extend(common | {
                        "device": f"split{part}", "memory_used_bytes": used // 2, "memory_total_bytes": 40 * GIB,
                        "gpu_utilization_percent": load,
                    } for part in "ab")  # fmt: skip
                at += step
    return pl.DataFrame(rows, infer_schema_length=None)


def leases(dice: random.Random, frame: Any) -> Any:
    held = frame.filter(pl.col("device") != "split").select("host", "device").unique().sort("device", "host").rows()
    rows: list[dict[str, Any]] = []
    for number in range(70):
        host, device = dice.choice(held)
        first = dice.randrange(SPAN * 10**6)
        last = min(first + dice.choice((1, 4_000_000, 25_000_000, 90_000_000, 4 * 3600 * 10**6)), SPAN * 10**6)
        if dice.random() < 0.3:
            first, last = first // 10**7 * 10**7, max(last // 10**7 * 10**7, first // 10**7 * 10**7 + 10**7)
        rows.append({
            "lease_id": f"l{number}", "owner": dice.choice("abc"), "name": dice.choice(("train", "serve")),
            "host": host, "device": device, "share": dice.choice((0.25, 0.5, 1.0)), "first": first, "last": last,
            "granted": dice.choice((0, 10 * GIB)), "ended": dice.random() < 0.7,
        })  # fmt: skip
    return pl.DataFrame(rows)


class History:
    def __init__(self, path: Path, seed: int) -> None:
        dice = random.Random(seed)
        self.samples = samples(dice)
        self.leases = leases(dice, self.samples)
        self.database = Database(path / "history.duckdb")
        number = self.database.series.number
        rows = self.samples.to_dicts()
        dice.shuffle(rows)
        columns: dict[str, list[Any]] = {
            "time": [START + timedelta(seconds=row["at"]) for row in rows],
            "series": [number(row["host"], row["device"]) for row in rows],
        }
        for field in list(SCHEMA)[2:]:
            columns[field.name] = [row.get(field.name) for row in rows]
        table = pa.table(columns, schema=SCHEMA)
        self.database.commit(Batch(stream="S", sequence=1, samples=table.slice(0, len(rows) // 2)))
        self.cursor = self.database.cursor()
        self._refresh()
        self.database.commit(Batch(stream="S", sequence=2, samples=table.slice(len(rows) // 2)))
        self._refresh()
        # What the interval is now says nothing of what it was.
        self.cursor.execute("INSERT INTO hosts BY NAME SELECT unnest(['h1', 'h2']) AS host, 0.1 AS interval_seconds")
        for device in self.samples["device"].unique().sort():
            part = device in ("splita", "splitb")
            self.cursor.execute(
                "INSERT INTO devices BY NAME SELECT ? AS device, ? AS host, ? AS mig_parent, ? AS mig_profile, "
                "? AS sm_count, ? AS mig_enabled, true AS present",
                [
                    device, "h2" if device == "moved" else "h1", "split" if part else None,
                    "3g.40gb" if part else None, 60 if part else 132, device == "split",
                ],
            )  # fmt: skip
        told: list[dict[str, Any]] = []
        for row in self.leases.to_dicts():
            zone = timezone(timedelta(hours=dice.choice(ZONES)))
            first, last = ((START + timedelta(microseconds=row[name])).astimezone(zone) for name in ("first", "last"))
            told.append(row | {
                "state": "released" if row["ended"] else "active", "granted_at": first.isoformat(),
                # A lease that was renewed ends before it would expire, one that nobody ended as it expires.
                "expires_at": (last + timedelta(hours=1) if row["ended"] else last).isoformat(),
                "ended_at": last.isoformat() if row["ended"] else None,
            })  # fmt: skip
        self.cursor.register("told", pa.Table.from_pylist(told))
        self.cursor.execute(
            "INSERT INTO leases BY NAME SELECT lease_id, owner, name, state, granted_at::TIMESTAMPTZ AS granted_at, "
            "expires_at::TIMESTAMPTZ AS expires_at, ended_at::TIMESTAMPTZ AS ended_at FROM told"
        )
        self.cursor.execute(
            "INSERT INTO lease_devices BY NAME SELECT lease_id, host, device, share, granted AS memory_bytes FROM told"
        )
        self.cursor.unregister("told")

    def _refresh(self) -> None:
        for level in rollups.LEVELS:
            rollups.refresh(self.cursor, level, sorted(self.database.days))

    def asked(self, sql: str) -> list[dict[str, Any]]:
        return self.cursor.execute(sql).pl().to_dicts()

    def held(self) -> Any:
        """Each sample with each lease that holds its device in the same ten seconds: `part` of them is the lease's.

        `joules` are those since the sample before, by the counter, or of the time that the sample stands for.
        """
        ten = pl.col("at") // 10 * 10_000_000
        return (
            self.known()
            .join(self.leases, on=["host", "device"])
            .with_columns(
                part=(pl.min_horizontal("last", ten + 10_000_000) - pl.max_horizontal("first", ten)).clip(0) / 1e7
            )
            .filter(pl.col("part") > 0)
        )

    def known(self) -> Any:
        grown = pl.col("energy_millijoules").diff().over("host", "device", order_by="at").fill_null(0) / 1e3
        counted = pl.col("energy_millijoules").is_not_null()
        by_power = pl.col("power_watts") * pl.col("step")
        return self.samples.with_columns(joules=pl.when(counted).then(grown).otherwise(by_power))


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.long)])
def history(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    global pl
    pl = pytest.importorskip("polars")
    made = History(tmp_path_factory.mktemp("own"), request.param)
    yield made
    made.database.close()


def near(value: float | None) -> Any:
    return None if value is None else pytest.approx(value, rel=1e-5, abs=1e-9)


def test_what_a_lease_used_of_its_devices(history: History) -> None:
    held = history.held()
    load = pl.col("gpu_utilization_percent")
    weighted = (load * pl.col("part")).sum() / pl.col("part").filter(load.is_not_null()).sum()
    own = {
        row["lease_id"]: row
        for row in held.group_by("lease_id")
        .agg(
            kwh=(pl.col("joules") * pl.col("part")).sum() * pl.col("share").first() / 3.6e6,
            powered=pl.col("joules").count(),
            mean=pl.coalesce(load.filter(pl.col("part") == 1).mean(), weighted),
            peak=pl.col("memory_used_bytes").filter(pl.col("part") == 1).max(),
        )
        .to_dicts()
    }
    rows = history.asked("FROM lease_device_usage")
    assert len(rows) == len(history.leases)
    spans = {row["lease_id"]: row for row in history.leases.to_dicts()}
    for row in rows:
        expected = own.get(row["lease_id"], {})
        span = spans[row["lease_id"]]
        assert row["hours"] == near((span["last"] - span["first"]) / 3.6e9), row
        boards = 3 / 7 if span["device"].startswith("split") else 1
        assert row["gpu_hours"] == near(boards * span["share"] * row["hours"]), row
        assert row["energy_kwh"] == near(expected["kwh"] if expected.get("powered") else None), (row, span)
        assert row["gpu_utilization_percent_mean"] == near(expected.get("mean")), (row, span)
        assert row["memory_used_bytes_peak"] == expected.get("peak"), (row, span)
    by_owner = {row["owner"]: row for row in history.asked("FROM usage_by_owner")}
    for owner in by_owner:
        ids = [row["lease_id"] for row in rows if row["owner"] == owner]
        assert by_owner[owner]["energy_kwh"] == near(sum(own[i]["kwh"] or 0 for i in ids if i in own))
        assert by_owner[owner]["gpu_hours"] == near(sum(row["gpu_hours"] for row in rows if row["owner"] == owner))


def test_how_much_memory_workloads_need(history: History) -> None:
    """Peaks that may be somebody else's, who shared the device, are of nobody."""
    others = history.leases.select("host", "device", "first", "last", "share", other="lease_id")
    shared = (
        history.leases.join(others, on=["host", "device"])
        .filter(pl.col("lease_id") != pl.col("other"), pl.col("share") < 1, pl.col("share_right") < 1)
        .filter(pl.col("first") < pl.col("last_right"), pl.col("first_right") < pl.col("last"))
    )
    peaks = (
        history.held()
        .filter(pl.col("part") == 1, pl.col("granted") > 0, pl.col("last") - pl.col("first") >= 60_000_000)
        .filter(~pl.col("lease_id").is_in(shared["lease_id"].unique().to_list()))
        .group_by("lease_id", "name")
        .agg(peak=pl.col("memory_used_bytes").max())
    )
    found = {row["name"]: row for row in history.asked("FROM memory_right_sizing")}
    assert set(found) == set(peaks["name"])
    for (name,), group in peaks.group_by("name"):
        assert found[name]["leases"] == len(group)
        assert found[name]["memory_used_bytes_max"] == group["peak"].max()


def test_the_minutes_of_leases_add_up_to_their_energy(history: History) -> None:
    """Where a lease begins and ends the minute is taken as even."""
    minute = pl.col("at") // 60 * 60_000_000
    held = (
        history.known()
        .join(history.leases, on=["host", "device"])
        .with_columns(
            part=(pl.min_horizontal("last", minute + 60_000_000) - pl.max_horizontal("first", minute)).clip(0) / 6e7
        )
    )
    own = dict(
        held.filter(pl.col("part") > 0, pl.col("joules").is_not_null())
        .group_by("lease_id")
        .agg((pl.col("joules") * pl.col("part") * pl.col("share")).sum())
        .rows()
    )
    found = history.asked("SELECT lease_id, sum(energy_joules) AS joules FROM lease_minutes GROUP BY 1")
    assert {row["lease_id"]: row["joules"] for row in found if row["joules"] is not None} == {
        lease: near(joules) for lease, joules in own.items()
    }


def test_a_report_has_what_leases_used_within_its_period(history: History) -> None:
    """Half an hour off the hours of UTC at its begin, and in the midst of a minute at its end."""
    first, last = 3 * 1_800_000_000, SPAN * 10**6 - 4_321_098_765
    period = Period(
        name="", start=START + timedelta(microseconds=first), end=START + timedelta(microseconds=last), zone="UTC"
    )
    boards = pl.when(pl.col("device").str.starts_with("split")).then(3 / 7).otherwise(1.0) * pl.col("share")
    cut = history.leases.with_columns(
        first=pl.max_horizontal("first", pl.lit(first)), last=pl.min_horizontal("last", pl.lit(last)), boards=boards
    ).filter(pl.col("first") < pl.col("last"))
    minutes = (
        history.known()
        .group_by("host", "device", pl.col("at") // 60 * 60_000_000)
        .agg(pl.col("gpu_utilization_percent").mean(), joules=pl.col("joules").sum())
        .join(cut, on=["host", "device"])
        .with_columns(
            held=(pl.min_horizontal("last", pl.col("at") + 60_000_000) - pl.max_horizontal("first", "at")).clip(0)
        )
    )
    known = pl.col("gpu_utilization_percent").is_not_null()
    own = (
        minutes.group_by("owner")
        .agg(
            known_us=(pl.col("held") * pl.col("boards")).filter(known).sum(),
            idle_us=(pl.col("held") * pl.col("boards")).filter(pl.col("gpu_utilization_percent") < 5).sum(),
            energy_mj=(pl.col("joules") * 1e3 * pl.col("held") / 6e7 * pl.col("share")).sum(),
        )
        .join(
            cut.group_by("owner").agg(granted_us=((pl.col("last") - pl.col("first")) * pl.col("boards")).sum()),
            on="owner",
        )
    )
    found = history.asked(
        "SELECT owner, sum(granted_us)::DOUBLE AS granted_us, sum(known_us)::DOUBLE AS known_us, "
        "sum(idle_us)::DOUBLE AS idle_us, sum(energy_mj)::DOUBLE AS energy_mj "
        f"FROM ({usage_sql.usage(slices(period), usage_sql.Filters())}) GROUP BY owner"
    )
    assert {row.pop("owner"): row for row in found} == {
        row.pop("owner"): {name: near(value) for name, value in row.items()} for row in own.to_dicts()
    }


def test_how_busy_the_fleet_was_by_hour(history: History) -> None:
    known = history.known().with_columns(
        hour=pl.col("at") // 3600, board=pl.col("device").str.replace("^split.$", "split"),
    )  # fmt: skip
    part = pl.col("device").is_in(["splita", "splitb"])
    by_device = known.group_by("hour", "device", "board").agg(
        pl.col("power_watts").mean(), pl.col("joules").sum(), load=pl.col("gpu_utilization_percent").mean(),
        used=pl.col("memory_used_bytes").mean(), total=pl.col("memory_total_bytes").max(),
    )  # fmt: skip
    own = {
        row["hour"]: row
        for row in by_device.group_by("hour")
        .agg(
            devices=pl.col("board").n_unique(), busy=pl.col("board").filter(pl.col("load") >= 5).n_unique(),
            power=pl.col("power_watts").sum(), kwh=pl.col("joules").sum() / 3.6e6,
            memory=100 * pl.col("used").filter(~part).sum() / pl.col("total").filter(~part).sum(),
        )
        .to_dicts()
    }  # fmt: skip
    loads = dict(known.group_by("hour").agg(pl.col("gpu_utilization_percent").mean()).rows())
    rows = history.asked("FROM fleet_by_hour ORDER BY hour")
    assert [row["hour"] for row in rows] == [START + timedelta(hours=hour) for hour in sorted(own)]
    for hour, row in zip(sorted(own), rows, strict=True):
        expected = own[hour]
        leased = sum(
            (3 / 7 if lease["device"].startswith("split") else 1) * lease["share"]
            * max(min(lease["last"], (hour + 1) * 3.6e9) - max(lease["first"], hour * 3.6e9), 0) / 3.6e9
            for lease in history.leases.to_dicts()
        )  # fmt: skip
        assert (row["devices"], row["busy_devices"]) == (expected["devices"], expected["busy"]), hour
        assert row["gpu_utilization_percent"] == near(loads[hour]), hour
        assert row["power_watts"] == near(expected["power"]), hour
        assert row["energy_kwh"] == near(expected["kwh"]), hour
        assert row["memory_used_percent"] == near(expected["memory"]), hour
        assert row["leased_devices"] == near(leased), hour


def test_for_how_long_devices_were_held_back(history: History) -> None:
    mask = pl.col("throttle_reasons_bitmask")
    seconds = {
        name: ((mask & bits) != 0).cast(pl.Int64) * pl.col("step")
        for name, bits in (("thermal_seconds", 0x60), ("power_seconds", 0x84), ("slowdown_seconds", 0x8))
    }
    own = (
        history.samples.filter(pl.col("device").is_in(BOARDS))
        .group_by(pl.col("at") // 3600, "host", "device")
        .agg(**{name: value.sum() for name, value in seconds.items()}, held=((mask & 0xEC) != 0).sum())
        .filter(pl.col("held") > 0)
    )
    found = {
        (row["hour"], row["host"], row["device"]): tuple(row[name] for name in seconds)
        for row in history.asked("FROM throttling")
    }
    assert found == {
        (START + timedelta(hours=hour), host, device): tuple(rest[:3]) for hour, host, device, *rest in own.rows()
    }


def test_errors_of_a_board_are_counted_on_each_of_its_hosts(history: History) -> None:
    grown = (
        history.samples.filter(pl.col("device").is_in(BOARDS))
        .sort("at")
        .group_by("host", "device", maintain_order=True)
        .agg(pl.col("ecc_uncorrected_count").last() - pl.col("ecc_uncorrected_count").first())
        .group_by("device")
        .agg(pl.col("ecc_uncorrected_count").sum())
    )
    found = history.asked(
        "SELECT device, ecc_uncorrected_7d AS n FROM device_health WHERE NOT starts_with(device, 'split')"
    )
    expected = dict(grown.rows())
    assert {row["device"]: row["n"] for row in found} == {name: expected[name] for name in BOARDS if name != "split"}
    assert sum(expected.values()) > 0
