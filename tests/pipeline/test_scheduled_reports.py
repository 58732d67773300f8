"""Reports that a processor makes regularly: each once, missed ones made up for, whatever was restarted."""

from __future__ import annotations

import base64
import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client.reports.periods import period_of
from corral.client.reports.schedule import Every, Planned, Schedule, due, parse_schedule
from hypothesis import given
from hypothesis import strategies as st
from support.local_cluster import CORRAL, corral, environment, wait_for
from support.notifier_rig import Place
from support.receivers import webhook
from support.usage_history import PRICES, usage_history

SCHEDULE = """
folder = "reports"
zone = "Europe/Berlin"
prices = "prices.toml"
[[report]]
name = "groups"
every = "month"
since = "{since}"
by = ["group", "model"]
formats = ["csv", "md"]
"""


@given(
    st.sampled_from(Every),
    st.datetimes(datetime(2024, 1, 3), datetime(2030, 1, 1), timezones=st.just(UTC)),
    st.integers(0, 40),
)
def test_each_complete_period_is_due_once_and_missed_ones_are_made_up_for(
    every: Every, now: datetime, days: int
) -> None:
    schedule = Schedule(folder="", zone="Europe/Berlin", delay="2h", report=[])
    planned = Planned(name="r", every=every)
    (first,) = due(planned, schedule, (), now)  # the last complete one, to begin with
    end = period_of(first, schedule.zone, now).end
    assert end + timedelta(hours=2) <= now
    length = {Every.DAY: 1, Every.WEEK: 7, Every.MONTH: 31, Every.YEAR: 366}[every]
    assert now - end <= timedelta(days=length, hours=3)
    assert due(planned, schedule, [first], now) == []
    # After a silence of days all of them follow, one behind the other.
    later = due(planned, schedule, [first], now + timedelta(days=days))
    for name in later:
        period = period_of(name, schedule.zone, now)
        assert period.start == end
        end = period.end
    assert now + timedelta(days=days) - end <= timedelta(days=length, hours=3)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("folder = 1", "folder: Expected `str`"),
        ('folder = "r"\n[[report]]\nname = "a"\nevery = "hour"', "1, every: 'hour' is none of day, week, month, year"),
        ('folder = "r"\n[[report]]\nname = "a/b"\nevery = "day"', "letters, digits"),
        ('folder = "r"\n[[report]]\nname = "a"\nevery = "day"\nsince = "2026-10"', "is no day: write 2026-10-07"),
        ('folder = "r"\nzone = "Mars"\n[[report]]\nname = "a"\nevery = "day"', "no time zone 'Mars'"),
        ('folder = "r"\nurl = "files"\n[[report]]\nname = "a"\nevery = "day"', "url: 'files' is none"),
        ('folder = "r"\ncolour = 1\n[[report]]\nname = "a"\nevery = "day"', "colour"),
        ("folder", "no TOML"),
    ],
)
def test_a_wrong_schedule_is_refused_with_the_key(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_schedule(text, Path("/"))


def test_the_schedule_in_the_documentation_is_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "reports.md").read_text()
    text = page.partition("```toml\n# /etc/corral/reports.toml\n")[2].partition("```")[0]
    schedule = parse_schedule(text, Path("/etc/corral"))
    assert [report.name for report in schedule.report] == ["fleet", "vision"]


@pytest.mark.long
def test_a_processor_makes_them_once_whatever_is_killed(server: EmbeddedServer, tmp_path: Path) -> None:
    usage_history(tmp_path).close()
    (tmp_path / "prices.toml").write_text(PRICES)
    schedule, folder = tmp_path / "reports.toml", tmp_path / "reports"
    command = [*CORRAL, "process", "--db", str(tmp_path / "history.duckdb"), "--reports", str(schedule)]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, env=environment(CORRAL_NATS_URL=server.url), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def made() -> set[str]:
        return {file.name for file in folder.glob("groups-*")} if folder.exists() else set()

    this = datetime.now(UTC) - timedelta(hours=3)
    last = f"{(this.replace(day=1) - timedelta(days=1)):%Y-%m}"
    schedule.write_text(SCHEDULE.format(since=last))
    processor = start()
    try:
        wait_for(lambda: made() == {f"groups-{last}.csv", f"groups-{last}.md"})
        # Once it is written down: a processor that is killed before makes them again.
        wait_for(
            lambda: (
                last in (folder / ".corral-reports.json").read_text()
                if (folder / ".corral-reports.json").exists()
                else False
            )
        )
        processor.kill()
        processor.wait()
        # A file that was taken away is not made again; what is missed is made, also where a kill came in between.
        (folder / f"groups-{last}.md").unlink()
        schedule.write_text(SCHEDULE.format(since="2026-01"))
        (folder / "groups-2026-01.csv").write_text("begun before the kill")
        processor = start()
        wait_for(lambda: "groups-2026-01.md" in made() and len(made()) % 2)
        wait_for(lambda: not list(folder.glob(".groups*")))
        asked = corral(
            "report", "usage", "--period", "2026-01", "--zone", "Europe/Berlin", "--by", "group,model",
            "--prices", str(tmp_path / "prices.toml"), "--format", "md", url=server.url,
        )  # fmt: skip
        assert (folder / "groups-2026-01.md").read_text() == asked.stdout
        assert (folder / "groups-2026-01.csv").read_text() == "begun before the kill", "it is never overwritten"
        assert f"groups-{last}.md" not in made()
    finally:
        processor.terminate()
        assert processor.wait(30) == 0
    refused = corral("process", "--db", str(tmp_path / "history.duckdb"), "--reports", str(tmp_path / "prices.toml"))
    assert refused.returncode == 2
    assert "prices.toml: " in refused.stderr


@pytest.mark.long
def test_each_is_sent_once_whoever_is_killed(server: EmbeddedServer, tmp_path: Path) -> None:
    """A processor that was killed before it could note a report as made publishes it again; nobody gets it twice."""
    usage_history(tmp_path).close()
    (tmp_path / "prices.toml").write_text(PRICES)
    schedule, folder, place = tmp_path / "reports.toml", tmp_path / "reports", Place(tmp_path)
    ledger, log = folder / ".corral-reports.json", tmp_path / "parts.log"
    this = datetime.now(UTC) - timedelta(hours=3)
    last = f"{(this.replace(day=1) - timedelta(days=1)):%Y-%m}"
    processor = [*CORRAL, "process", "--db", str(tmp_path / "history.duckdb"), "--reports", str(schedule)]
    notifier = [*CORRAL, "notifier", "--targets", str(place.targets), "--rules", str(place.rules)]

    def start(*command: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(command, env=environment(CORRAL_NATS_URL=server.url), stdout=out, stderr=out)

    def made() -> list[str]:
        return json.loads(ledger.read_text()).get("groups", []) if ledger.exists() else []

    with webhook() as hook:
        place.write(
            f'boss = "{hook.url}"\nother = "{hook.url}"',
            '[[rule]]\nname = "a"\non = ["report"]\nworkload = "groups"\nto = ["boss"]\n'
            '[[rule]]\nname = "b"\non = ["report"]\nowner = "ann"\nto = ["other"]\n',
        )
        running = [start(*notifier)]
        wait_for(lambda: "sending: 2 rules" in log.read_text())
        schedule.write_text('url = "https://files.example/reports"\n' + SCHEDULE.format(since=last))
        running.append(start(*processor))
        try:
            wait_for(lambda: made() == [last])
            wait_for(lambda: "sent report:" in log.read_text())
            for each in running:
                each.kill()
                each.wait()
            ledger.write_text("{}")
            running = [start(*processor)]
            wait_for(lambda: made() == [last])
            running[0].kill()
            running[0].wait()
            # Others, which are behind it in the stream.
            schedule.write_text('url = "https://files.example/reports"\n' + SCHEDULE.format(since="2026-01"))
            running = [start(*notifier), start(*processor)]
            planned = Planned(name="groups", every=Every.MONTH, since="2026-01")
            all_ = due(planned, Schedule(folder="", zone="Europe/Berlin", report=[]), (), datetime.now(UTC))
            wait_for(lambda: set(made()) == set(all_))
            wait_for(lambda: len(hook.bodies) >= len(all_))
        finally:
            for each in running:
                each.terminate()
                each.wait(30)
        assert sorted(hook.titles) == [f"GPU usage, {period} (groups)" for period in sorted(all_)]
        first = hook.bodies[0]
        assert "GPU-hours granted: " in first["message"]
        assert "https://files.example/reports" in first["message"]
        files = {file["filename"]: base64.b64decode(file["base64"]) for file in first["attachments"]}
        assert files == {file.name: file.read_bytes() for file in folder.glob(f"groups-{last}.*")}
        assert len(files) == 2
