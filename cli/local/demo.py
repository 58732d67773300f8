"""`corral demo`: a cluster comes up, telemetry flows, GPUs are granted, jobs run, the history answers, all ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from msgspec import Struct
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text

from ...client import Client, CorralError, QueryResult, Rejected
from ...client.jobs.names import Selection
from ...client.request import RequestFields
from ...schemas import operations, requests
from .. import render
from ..exits import USAGE, CommandError
from ..options import console
from ..work.jobs import summary as job_summary
from ..work.jobs.output import print_logs
from .server import EmbeddedServer
from .supervisor import DataFolder, Part, Supervisor, SupervisorEvent
from .up import cluster_parts, wait_until_ready

DATA_VARIABLE: Final = "CORRAL_DATA"
RECORDING: Final = Path("gentd26", "gpu_samples.parquet")
SPEED: Final = 1200
"""Replay speed: a minute of the recording, the time between its samples, takes a twentieth of a second."""
FIRST_SAMPLES: Final = 2_000
MIN_SAMPLES: Final = 12_000
"""Minimum number of samples in the history before it is queried."""
PATIENCE_SECONDS: Final = 20.0
SWEEP_TASKS: Final = 4
SWEEP: Final = 'for step in 1 2 3; do echo "rate 0.$CORRAL_ARRAY_INDEX, step $step of 3"; sleep 0.2; done'


class Question(Struct, frozen=True):
    """A question to the history, in words and in SQL."""

    words: str
    sql: str


QUESTIONS: Final = (
    Question(
        "Which hosts are busiest, and which are idle?",
        """
SELECT host, count(DISTINCT device) AS gpus, count(*) AS samples,
       round(avg(gpu_utilization_percent), 1) AS mean_util,
       round(quantile_cont(gpu_utilization_percent::DOUBLE, 0.95), 1) AS p95_util,
       round(avg(memory_used_bytes) / 2**30, 1) AS mean_gib
FROM samples GROUP BY host ORDER BY mean_util DESC LIMIT 6""",
    ),
    Question(
        "Which GPUs hold memory but are idle?",
        """
SELECT host, index AS gpu, round(max(memory_used_bytes) / 2**30, 1) AS held_gib,
       round(avg(gpu_utilization_percent), 2) AS mean_util,
       round(100.0 * count_if(gpu_utilization_percent < 1) / count(*)) AS idle_percent
FROM samples JOIN devices USING (device, host)
GROUP BY ALL HAVING mean_util < 2 AND held_gib > 4 ORDER BY held_gib DESC, gpu LIMIT 6""",
    ),
    Question(
        "Which leases held GPUs, for how long, and how busy were the GPUs?",
        """
SELECT l.owner, l.name, l.state, len(l.devices) AS gpus,
       round(date_diff('millisecond', l.granted_at, coalesce(l.ended_at, now())) / 1000, 1) AS seconds,
       count(s.time) AS samples, round(avg(s.gpu_utilization_percent), 1) AS mean_util
FROM leases l LEFT JOIN samples s
  ON list_contains(l.devices, s.device) AND s.time BETWEEN l.granted_at AND coalesce(l.ended_at, now())
GROUP BY ALL ORDER BY l.owner""",
    ),
)


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FOLDER", help="Keep the cluster's data in this folder. Default: a temporary folder."
        ),
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            "--recording",
            metavar="FILE",
            help="Parquet or CSV file of real samples to replay. Default: one in $CORRAL_DATA.",
        ),
    ] = None,
    simulated: Annotated[bool, typer.Option("--simulated", help="Simulate GPUs even if there is a recording.")] = False,
) -> None:
    """Run a tour on a temporary cluster: telemetry, requests, a rejection with its reasons, distribution, jobs, SQL.

    The cluster uses a temporary folder and a free port, and is stopped at the end. It replays a recording of real GPUs
    if there is one, and simulates a fleet otherwise.

    Examples:
      corral demo
      corral demo --simulated
      corral demo --recording my_gpus.parquet
    """
    found = None if simulated else recording or find_recording()
    if found is not None and not found.is_file():
        raise CommandError(f"there is no recording at {found}", USAGE)
    with contextlib.ExitStack() as stack:
        folder = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corral-demo-")))
        held = DataFolder(folder.expanduser().absolute())
        stack.callback(held.close)
        asyncio.run(_demo(held.path, found))


def find_recording() -> Path | None:
    """Path of the recording of real GPUs that `$CORRAL_DATA` names, as a file or its folder; None if there is none."""
    path = Path(os.environ.get(DATA_VARIABLE) or os.devnull)
    found = path if path.is_file() else path / RECORDING
    return found if found.is_file() else None


async def _demo(folder: Path, recording: Path | None) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    began = time.monotonic()
    show = Show(console())
    troubles: list[SupervisorEvent] = []

    def tell(event: SupervisorEvent) -> None:
        if event.kind == "died":
            troubles.append(event)

    parts = cluster_parts(folder, _collector(folder, recording))
    supervisor = Supervisor(EmbeddedServer(folder / "nats"), parts, folder / "logs", tell)
    try:
        show.title(recording)
        with show.busy("Starting bus, processor, planner and collector…"):
            await supervisor.start()
            missing, summary = await wait_until_ready(supervisor.server.url, parts, timeout=40)
        if missing:
            details = "\n".join(f"{trouble.part}: {trouble.detail}" for trouble in troubles[-3:])
            raise CommandError(f"not ready in time: {', '.join(missing)}\n{details}".rstrip())
        assert summary is not None
        show.ready(supervisor, summary, time.monotonic() - began)
        from ...client import connect

        async with connect(supervisor.server.url, owner="demo", name="corral-demo") as client:
            await _scenes(client, show)
    finally:
        with show.busy("Stopping…"):
            await supervisor.stop()
    show.end(time.monotonic() - began)


def _collector(folder: Path, recording: Path | None) -> Part:
    state = ["--state", str(folder / "collector")]
    if recording is None:
        arguments = ["--source", "simulated", "--hosts", "6", "--devices", "8", "--interval", "100ms"]
        arguments += ["--time-scale", "60", "--background", "0.3"]
    else:
        arguments = ["--source", "replay", "--file", str(recording), "--hosts", "18", "--prefix", "node"]
        arguments += ["--speed", str(SPEED), "--loop", "--interval", "100ms"]
    return Part(name="collector", arguments=["collect", *arguments, *state])


async def _scenes(client: Client, show: Show) -> None:
    with show.busy("Waiting for telemetry…"):
        await _until(lambda: _recorded(client, FIRST_SAMPLES, 0))
    show.scene("Telemetry flows", "corral devices")
    devices = await client.devices()
    # The most informative ones: the busiest of several hosts.
    busiest = sorted(devices, key=lambda device: -(device.utilization_percent or 0))[:5]
    show.out.print(render.devices_table(busiest, {}, show.out.width))
    show.out.print(f"[dim]… and {len(devices) - len(busiest)} more[/]")

    show.scene("alice requests two GPUs with 20 GiB each", "corral request --gpus 2 --memory 20GiB")
    held = await _ask(client, show, owner="alice", name="train", gpus=2, memory="20GiB", ttl="2m")

    show.scene("bob requests half a GPU", "corral request --share 0.5 --memory 8GiB")
    shared = await _ask(client, show, owner="bob", name="notebook", share=0.5, memory="8GiB", ttl="2m")

    show.scene(
        "carol distributes 1,000 prompts over four GPUs, by their memory",
        "corral request --gpus 4 --items 1000 --method capacity --weight-by memory",
    )
    worked = await _ask(
        client,
        show,
        owner="carol",
        name="inference",
        gpus=4,
        ttl="2m",
        items=1000,
        method="capacity",
        weight_by="memory",
    )

    show.scene("dave requests more than the fleet has", "corral request --gpus 64 --memory 70GiB")
    await _ask(client, show, owner="dave", gpus=64, memory="70GiB")

    sweep = await _sweep(client, show)

    with show.busy("The history stores all of it…"):
        await _until(lambda: _recorded(client, MIN_SAMPLES, 0))
    show.scene("alice renews her lease, bob releases his", "corral renew … && corral release …")
    if held is not None:
        renewed = await client.renew(held.lease_id, owner="alice")
        show.out.print(f"[green]Renewed[/] {renewed.lease_id}: ends in {render.left(renewed)}")
    if shared is not None:
        released = await client.release(shared.lease_id, owner="bob")
        show.out.print(f"[green]Released[/] {released.lease_id}")
    show.out.print(render.leases_table(await client.leases(), show.out.width))

    granted = [lease for lease in (held, shared, worked) if lease is not None]
    tasks = SWEEP_TASKS if sweep else 0
    ended = tasks + int(shared is not None)
    await _until(lambda: _recorded(client, MIN_SAMPLES, len(granted) + tasks, ended=ended))
    if sweep:
        show.scene("What the sweep used of what it asked for", f"corral job {sweep}")
        used = await job_summary.used(client, Selection(sweep))
        show.pairs([(name, escape(value)) for name, value in used])
    for question in QUESTIONS:
        show.scene(question.words, None)
        show.answer(question.sql.strip(), await client.query(question.sql))


async def _ask(client: Client, show: Show, **fields: Any) -> requests.Lease | None:
    request: RequestFields = fields  # pyright: ignore[reportAssignmentType]
    began = time.perf_counter()
    try:
        lease = (await client.request(**request)).lease
    except Rejected as rejected:
        took = time.perf_counter() - began
        for line in render.rejection_lines(rejected.rejection):
            show.out.print(line)
        show.out.print(f"[dim]answered in {took * 1000:.1f} ms[/]")
        return None
    took = time.perf_counter() - began
    show.out.print(
        f"[bold green]Granted[/] lease [bold]{lease.lease_id}[/] to {lease.owner} [dim]in {took * 1000:.1f} ms[/]"
    )
    show.out.print(render.grants_table(lease.grants))
    return lease


async def _sweep(client: Client, show: Show) -> str | None:
    """Submit an array, and follow what its tasks print until all have ended.

    Returns:
        The job's id; None if it has not ended in time, since all devices are busy.
    """
    words = f"erin submits a sweep of {SWEEP_TASKS} tasks as a job, and follows what they print"
    array = f"0-{SWEEP_TASKS - 1}"
    show.scene(words, f"corral submit --array {array} --share 0.25 --memory 2GiB --name sweep --follow sweep.sh")
    job = await client.jobs.submit(
        ["sh", "-c", SWEEP], owner="erin", array=array, share=0.25, memory="2GiB", name="sweep", directory="/"
    )
    show.out.print(f"[green]Submitted[/] job [bold]{job.job_id}[/] ({SWEEP_TASKS} tasks)")
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await print_logs(client, job.job_id, follow=True)
            job = (await client.jobs.wait(job)).job
    except TimeoutError:
        job = (await client.jobs.get(job, tasks=False)).job
        show.out.print(f"Job {job.job_id} is {job.state}: {escape(job.message)}")
        await client.jobs.cancel(job, operator="erin")
        return None
    show.out.print(f"[green]Ended[/] job {job.job_id}: {job.state}")
    return job.job_id


async def _recorded(client: Client, samples: int, leases: int, ended: int = 0) -> bool:
    known = await client.query(
        "SELECT (SELECT count(*) FROM samples), (SELECT count(*) FROM leases), (SELECT count(ended_at) FROM leases)"
    )
    return all(have >= want for have, want in zip(known.rows[0], (samples, leases, ended), strict=True))


async def _until(ready: Callable[[], Awaitable[bool]]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(CorralError):
            if await ready():
                return
        await asyncio.sleep(0.2)


class Show:
    """Output of the demo."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self._number = 0

    def busy(self, text: str) -> contextlib.AbstractContextManager[Any]:
        """Show a spinner on a terminal, or print a line in a pipe."""
        if self.out.is_terminal:
            return self.out.status(text)
        self.out.print(f"[dim]{text}[/]")
        return contextlib.nullcontext()

    def title(self, recording: Path | None) -> None:
        """Print the title, with the source of the telemetry."""
        source = (
            f"Real telemetry: {recording.name}, {SPEED} times faster than recorded."
            if recording
            else "Simulated GPUs, at one minute per second (no recording of real ones was found)."
        )
        self.out.print(
            Panel(
                Group(Text("GPU fleet telemetry, history and placement on one message bus."), Text(source, "dim")),
                title="[bold]Corral[/]",
                title_align="left",
                border_style="green",
                width=min(self.out.width, 100),
            )
        )

    def ready(self, supervisor: Supervisor, summary: operations.FleetSummary, seconds: float) -> None:
        """Print the running processes, the devices and the time that the start took."""
        pids = " · ".join(f"{name} {pid}" for name, pid in supervisor.pids.items())
        models = ", ".join(f"{count} × {name}" for name, count in sorted(summary.models.items()))
        self.out.print(
            f"[green]✓[/] A cluster in {seconds:.1f} s at {supervisor.server.url} [dim](processes: {pids})[/]"
        )
        self.out.print(f"[green]✓[/] {summary.devices} GPUs on {summary.hosts} hosts: {escape(models)}")

    def scene(self, words: str, command: str | None) -> None:
        """Print a numbered heading, with the command that does the same."""
        self._number += 1
        self.out.print()
        self.out.print(f"[bold green]{self._number}[/] [bold]{escape(words)}[/]")
        if command:
            self.out.print(f"  [dim]$ {escape(command)}[/]")

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print names with their values, which are markup."""
        made = render.table("", "")
        for name, value in pairs:
            made.add_row(f"[dim]{name}[/]", value)
        self.out.print(made)

    def answer(self, sql: str, result: QueryResult) -> None:
        """Print a query and its result."""
        self.out.print(Syntax(sql, "sql", theme="ansi_dark", background_color="default", word_wrap=True))
        numbers = [
            name
            for at, name in enumerate(result.columns)
            if any(isinstance(row[at], int | float) for row in result.rows)
        ]
        made = render.table(*result.columns, right=numbers)
        for row in result.rows:
            made.add_row(*("–" if value is None else escape(f"{value}") for value in row))
        self.out.print(made)
        self.out.print(f"[dim]{len(result)} rows in {result.seconds * 1000:.0f} ms[/]")

    def end(self, seconds: float) -> None:
        """Print the total time and the command to continue with."""
        self.out.print()
        self.out.print(f"[bold green]That was Corral[/], in {seconds:.0f} s. To keep a cluster: [bold]corral up[/]")
