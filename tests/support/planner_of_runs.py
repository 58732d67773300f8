"""The planner's side of a runner, for tests: it answers reports with what a test orders, over a real bus."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from corral.schemas import codec, subjects
from corral.schemas.requests import Grant, WorkRequest
from corral.schemas.work.jobs import FINAL, JobSpec, JobState
from corral.schemas.work.runs import Run, RunnerReport, RunOrders, RunReport, RunVerb
from msgspec.structs import replace
from nats.aio.client import Client
from nats.aio.msg import Msg
from support.local_cluster import CORRAL, environment

SECONDS = 30.0


class PlannerOfRuns:
    """Orders runs of one host, as a planner does: complete in each answer, and at once in between.

    Attributes:
        runs: what the host shall have.
        reports: the last report of each run.
        known: ids of ended runs, named in the next answers.
        acknowledges: whether final reports are stored.
    """

    def __init__(self, nc: Client, host: str = "node-7") -> None:
        self.nc = nc
        self.host = host
        self.runs: dict[str, Run] = {}
        self.reports: dict[str, RunReport] = {}
        self.all_reports: list[RunnerReport] = []
        self.known: set[str] = set()
        self.acknowledges = True
        self.term = 1
        self.token = ""
        self._news = asyncio.Event()

    async def open(self) -> None:
        self._subscription = await self.nc.subscribe(subjects.runner_subject(self.host), cb=self._answer)

    async def close(self) -> None:
        await self._subscription.unsubscribe()

    async def _answer(self, message: Msg) -> None:
        report = codec.decode(message.data, RunnerReport)
        self.token = report.token
        self.all_reports.append(report)
        for each in report.runs:
            self.reports[each.run_id] = each
            if each.part.state in FINAL:
                if self.acknowledges:
                    self.known.add(each.run_id)
                    self.runs.pop(each.run_id, None)
            elif each.run_id in self.runs:
                # As a planner does: the job itself is sent only until it is reported.
                self.runs[each.run_id] = replace(self.runs[each.run_id], spec=None)
        orders = RunOrders(
            planner="p1",
            term=self.term,
            token=report.token,
            runs=list(self.runs.values()),
            complete=True,
            known=sorted(self.known),
        )
        await message.respond(codec.encode(orders))
        self._news.set()

    async def push(self, *runs: Run) -> None:
        """Order runs between reports."""
        self.runs |= {run.run_id: run for run in runs}
        orders = RunOrders(planner="p1", term=self.term, token=self.token, runs=list(runs))
        await self.nc.publish(subjects.runs_subject(self.host), codec.encode(orders))

    async def until(self, found: Callable[[], Any], seconds: float = SECONDS) -> Any:
        """The first truthy value, looked for after each report."""
        async with asyncio.timeout(seconds):
            while not (value := found()):
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await self._news.wait()
        return value

    async def state(self, run_id: str, *states: JobState) -> RunReport:
        """The report of a run once it is in one of these states."""
        return await self.until(
            lambda: (found := self.reports.get(run_id)) and found.part.state in states and found, SECONDS
        )

    async def ended(self, run_id: str) -> RunReport:
        """The final report of a run."""
        return await self.until(
            lambda: (found := self.reports.get(run_id)) and found.part.state in FINAL and found, SECONDS
        )


def a_run(*words: str, job: int = 1, verb: RunVerb = RunVerb.START, owner: str = "alice", **fields: Any) -> Run:
    """A run of a command on `node-7`; fields of the job and of the run by name."""
    spec = {name: fields.pop(name) for name in list(fields) if name in JobSpec.__struct_fields__}
    spec.setdefault("grace_seconds", 0.5)
    spec.setdefault("directory", "/")
    request = WorkRequest(owner=owner, gpus=1, name="a-job")
    return Run(
        **{
            "run_id": f"{job}.1",
            "verb": verb,
            "owner": owner,
            "job_id": str(job),
            "lease_id": uuid.uuid4().hex,
            "grants": [Grant(host="node-7", device="GPU-1")],
            "lease_environment": {"CUDA_VISIBLE_DEVICES": "GPU-1"},
            "spec": JobSpec(request=request, command=list(words), **spec),
            "hosts": ["node-7"],
            **fields,
        }
    )


class RunnerProcess:
    """`corral runner` as a process, which can be killed and started again on its folder."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *options: str,
        host: str = "node-7",
        more: dict[str, str] | None = None,
        account: pwd.struct_passwd | None = None,
    ) -> None:
        self._url = url
        self._host = host
        self._more = more or {}
        self._account = account
        self.folder = folder
        self._options = options or ("--own-account", "--executor", "process")
        self.log = folder / "runner.log"
        folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._corral, "runner", "--host", self._host, "--state", str(self.folder), *self._options],
                env=environment(
                    CORRAL_NATS_URL=self._url, SECRET_OF_THE_RUNNER="x", PYTHONUNBUFFERED="1", **self._more
                ),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                user=None if self._account is None else self._account.pw_uid,
                group=None if self._account is None else self._account.pw_gid,
                extra_groups=None if self._account is None else [],
                cwd="/",
            )

    @property
    def _corral(self) -> Sequence[str]:
        """`corral`; for another account with Debian's Python, since it may not enter the home of root."""
        if self._account is None:
            return CORRAL
        packages = sysconfig.get_path("purelib")
        code = f"import site; site.addsitedir({packages!r}); from corral.cli.main import main; main()"
        return ("/usr/bin/python3", "-c", code)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.wait()

    def end_runs(self) -> None:
        """End whatever supervisors a failed test has left."""
        for claim in self.folder.glob("runner/*/runs/*/status"):
            pid = codec.decode(claim.read_bytes().splitlines()[0], dict, codec.JSON)["pid"]
            # It may end at any moment, also between two of these calls.
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"zygote.py" in words or b"supervisor.py" in words:
                    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(child), signal.SIGKILL)
                    os.kill(pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def planner_of_runs(nc: Client, host: str = "node-7") -> AsyncIterator[PlannerOfRuns]:
    """A planner of runs that answers."""
    planner = PlannerOfRuns(nc, host)
    await planner.open()
    yield planner
    await planner.close()


PYTHON = sys.executable
