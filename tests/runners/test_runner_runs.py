"""Runs by a real runner: what it executes and as whom, what it reports, and what of the output reaches the bus."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from corral.bus import stream_reader
from corral.bus.connect import connect
from corral.bus.layout import ensure_layout
from corral.cli.local.server import EmbeddedServer
from corral.cli.operate.doctor import confinement
from corral.client import connect as connected_client
from corral.schemas import codec, subjects
from corral.schemas.work.jobs import JobState
from corral.schemas.work.runs import LOG_CHUNK_BYTES, LogChunk, Run, RunReport, RunVerb
from msgspec.structs import replace
from nats.aio.client import Client
from support.planner_of_runs import PlannerOfRuns, RunnerProcess, a_run, planner_of_runs
from support.sessions import inside

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runner")


@pytest.fixture(scope="module")
def bus(folder: Path) -> Iterator[EmbeddedServer]:
    embedded = EmbeddedServer(folder / "nats")
    embedded.start()
    yield embedded
    embedded.kill()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(bus: EmbeddedServer) -> AsyncIterator[Client]:
    nc = await connect(bus.url, name="test")
    await ensure_layout(nc.jetstream())
    yield nc
    await nc.close()


@pytest.fixture(scope="module")
def process(bus: EmbeddedServer, folder: Path) -> Iterator[RunnerProcess]:
    runner = RunnerProcess(bus.url, folder / "state")
    yield runner
    runner.stop()
    runner.end_runs()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def orders(client: Client, process: RunnerProcess) -> AsyncIterator[PlannerOfRuns]:
    async with planner_of_runs(client) as planner:
        await planner.until(lambda: planner.token)
        yield planner


_jobs = iter(range(100, 10_000))


def printed(report: RunReport) -> str:
    """What a run has printed so far."""
    return Path(report.part.log_file or os.devnull).read_text()


def processes_with(text: bytes) -> dict[str, bytes]:
    """Command lines of the processes that have a text in their arguments or environment; without this one."""
    found: dict[str, bytes] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if text in words + (entry / "environ").read_bytes():
                    found[entry.name] = words
    return found


def differences(report: RunReport, found: list[LogChunk]) -> list[int]:
    """Offsets of the chunks that are not what the file has there."""
    with Path(report.part.log_file).open("rb") as file:
        return [chunk.offset for chunk in found if os.pread(file.fileno(), len(chunk.data), chunk.offset) != chunk.data]


def size_of(report: RunReport) -> int:
    """Size of a run's output in its file."""
    return Path(report.part.log_file).stat().st_size


async def run(planner: PlannerOfRuns, *words: str, **fields: object) -> tuple[RunReport, str]:
    """Execute a command to its end; its final report, and what it has printed."""
    ordered = a_run(*words, job=next(_jobs), **fields)
    await planner.push(ordered)
    report = await planner.ended(ordered.run_id)
    return report, printed(report)


async def chunks(nc: Client, run: Run) -> list[LogChunk]:
    """All that the stream has of a run's output, by offset."""
    subject = subjects.log_subject("node-7", run.job_id, run.index or 0, "*", run.owner)
    found = [
        codec.decode(message.data, LogChunk)
        async for message in stream_reader.read_direct(nc, subjects.LOGS_STREAM, subject)
    ]
    return sorted(found, key=lambda chunk: (chunk.offset, len(chunk.data)))


async def all_chunks(nc: Client, run: Run) -> list[LogChunk]:
    """What the stream has of a run's output once that has ended."""
    async with asyncio.timeout(60):
        while True:
            found = await chunks(nc, run)
            if any(chunk.ended for chunk in found):
                return found
            await asyncio.sleep(0.05)


async def test_exit_codes_and_signals_are_those_of_the_process(orders: PlannerOfRuns) -> None:
    for words, code, number in (
        (("true",), 0, None),
        (("sh", "-c", "exit 41"), 41, None),
        (("sh", "-c", "kill -9 $$"), None, signal.SIGKILL),
        (("sh", "-c", "kill -SEGV $$"), None, signal.SIGSEGV),
        (("no-such-command",), 127, None),
        (("/etc/passwd",), 126, None),
    ):
        report, out = await run(orders, *words)
        part = report.part
        assert (words, part.exit_code, part.signal) == (words, code, number)
        assert part.state is (JobState.DONE if code == 0 else JobState.FAILED)
        # Everyone may see the message, and only its owner what is printed.
        why = {126: "permission denied", 127: "command not found"}.get(code or 0, "")
        assert part.message == (why and f"its command: {why}")
        assert out == (why and f"corral: {words[0]}: {why}\n")
        assert part.log_bytes == len(out)


async def test_what_everyone_may_see_of_a_run_that_fails_names_nothing_of_its_owner(orders: PlannerOfRuns) -> None:
    for fields in (
        {"command": "secret-command"},
        {"directory": "/nowhere/secret"},
        {"output": "/nowhere/secret"},
        {"output": "/tmp/secret\0"},
        {"script": "#!/secret/interpreter\n"},
        {"image": "secret image"},
    ):
        given = dict(fields)
        report, _ = await run(
            orders, *filter(None, [given.pop("command", "" if "script" in given else "true")]), **given
        )
        assert report.part.state is JobState.FAILED
        assert "secret" not in report.part.message, fields


async def test_a_script_gets_its_arguments_and_the_environment_of_the_job_alone(orders: PlannerOfRuns) -> None:
    script = '#!/bin/sh\necho "$1|$PWD|$CUDA_VISIBLE_DEVICES|$MINE"; env | grep -c SECRET_OF_THE_RUNNER; env | sort\n'
    report, out = await run(
        orders,
        script=script,
        arguments=["a b"],
        # The lease's variables are above those of the job.
        environment={"MINE": "mine", "CUDA_VISIBLE_DEVICES": "all of them"},
        directory="/tmp",
        index=7,
        first_index=3,
        last_index=9,
        tasks=4,
        attempt=2,
    )
    assert report.part.exit_code == 0
    lines = out.splitlines()
    assert lines[:2] == ["a b|/tmp|GPU-1|mine", "0"]
    values = dict(line.split("=", 1) for line in lines[2:])
    job = {name: value for name, value in values.items() if name.startswith("CORRAL_")}
    assert job.pop("CORRAL_LEASE") == report.lease_id
    assert job == {
        "CORRAL_JOB_ID": report.run_id.partition(".")[0],
        "CORRAL_JOB_NAME": "a-job",
        "CORRAL_OWNER": "alice",
        "CORRAL_ATTEMPT": "2",
        "CORRAL_HOSTS": "node-7",
        "CORRAL_ADDRESSES": "node-7",
        "CORRAL_ARRAY_INDEX": "7",
        "CORRAL_ARRAY_FIRST": "3",
        "CORRAL_ARRAY_LAST": "9",
        "CORRAL_ARRAY_COUNT": "4",
    }


async def test_a_job_without_devices_sees_none(orders: PlannerOfRuns) -> None:
    _, out = await run(orders, "env", grants=[], lease_environment={})
    assert {"CUDA_VISIBLE_DEVICES=", "ROCR_VISIBLE_DEVICES=", "HIP_VISIBLE_DEVICES="} <= set(out.splitlines())


async def test_the_processes_of_a_host_have_ranks_and_one_that_fails_ends_the_others(orders: PlannerOfRuns) -> None:
    line = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $NODE_RANK $NNODES $MASTER_ADDR $MASTER_PORT"'
    several = {"hosts": ["node-3", "node-7"], "addresses": ["10.0.0.3", "10.0.0.7"], "rank": 1, "tasks_per_host": 2}
    ordered = a_run("sh", "-c", line, job=next(_jobs))
    ordered = replace(ordered, **{name: several[name] for name in ("addresses", "rank")}, hosts=several["hosts"])
    assert ordered.spec is not None
    ordered = replace(ordered, spec=replace(ordered.spec, hosts=2, tasks_per_host=2))
    await orders.push(ordered)
    report = await orders.ended(ordered.run_id)
    out = sorted(printed(report).splitlines())
    port = out[0].split()[-1]
    assert out == [f"2 0 4 2 1 2 10.0.0.3 {port}", f"3 1 4 2 1 2 10.0.0.3 {port}"]
    # One of two fails while the other would go on.
    report, _ = await run(orders, "sh", "-c", '[ "$LOCAL_RANK" = 0 ] && exit 9; sleep 300', tasks_per_host=2)
    assert (report.part.state, report.part.exit_code) == (JobState.FAILED, 9)


async def test_all_hosts_of_a_task_are_prepared_before_they_start(orders: PlannerOfRuns) -> None:
    good = a_run("true", job=next(_jobs), verb=RunVerb.PREPARE)
    bad = a_run("true", job=next(_jobs), verb=RunVerb.PREPARE, directory="/no/such")
    await orders.push(good, bad)
    assert (await orders.state(bad.run_id, JobState.FAILED)).part.message == "its working directory is not there"
    await orders.until(lambda: (found := orders.reports.get(good.run_id)) and found.prepared)
    # The order to start comes without the job, which is kept; that to end it, to one that has not been started.
    await orders.push(replace(good, verb=RunVerb.START, spec=None))
    assert (await orders.ended(good.run_id)).part.exit_code == 0
    other = a_run("true", job=next(_jobs), verb=RunVerb.PREPARE)
    await orders.push(other)
    await orders.until(lambda: (found := orders.reports.get(other.run_id)) and found.prepared)
    await orders.push(replace(other, verb=RunVerb.STOP, spec=None, reason="another host can't"))
    report = await orders.state(other.run_id, JobState.CANCELLED)
    assert (report.part.message, report.part.started_at) == ("another host can't", None)


async def test_a_run_that_nothing_is_known_of_is_lost(orders: PlannerOfRuns) -> None:
    ordered = replace(a_run("true", job=next(_jobs)), spec=None)
    await orders.push(ordered)
    assert "knows nothing of it" in (await orders.state(ordered.run_id, JobState.LOST)).part.message


async def test_orders_without_the_token_or_of_an_earlier_term_change_nothing(orders: PlannerOfRuns) -> None:
    token = orders.token
    orders.term = 5
    await run(orders, "true")
    try:
        for orders.token, orders.term in (("", 5), ("0" * 64, 5), (token, 4)):
            wrong = a_run("true", job=next(_jobs))
            await orders.push(wrong)
            orders.runs.pop(wrong.run_id)
    finally:
        orders.token, orders.term = token, 5
    await run(orders, "true")
    assert {report.run_id for report in orders.reports.values()}.isdisjoint({wrong.run_id})


async def test_signals_of_a_notice_come_once_and_a_stop_has_its_grace(orders: PlannerOfRuns) -> None:
    script = 'trap "echo noticed" USR1; trap "echo asked; exit 7" TERM; echo ready; while :; do sleep 0.02; done'
    ordered = a_run("sh", "-c", script, job=next(_jobs))
    await orders.push(ordered)
    report = await orders.state(ordered.run_id, JobState.RUNNING)
    await orders.until(lambda: "ready" in printed(report))
    noticed = replace(ordered, spec=None, notice=1, signal=signal.SIGUSR1)
    for _ in range(3):
        await orders.push(noticed)
    await orders.until(lambda: "noticed" in printed(report))
    await orders.push(replace(noticed, verb=RunVerb.STOP, signal=0, notice=0, grace_seconds=5.0, reason="cancelled"))
    report = await orders.ended(ordered.run_id)
    # The whole process group gets the signals: the shell says so of its children.
    said = [line for line in printed(report).splitlines() if line in ("ready", "noticed", "asked")]
    assert said == ["ready", "noticed", "asked"]
    assert (report.part.state, report.part.exit_code, report.part.message) == (JobState.CANCELLED, 7, "cancelled")


async def test_memory_and_cpu_are_those_of_all_processes(orders: PlannerOfRuns) -> None:
    work = (
        "import time; held = bytearray(64 * 2**20); end = time.process_time() + 0.3\n"
        "while time.process_time() < end: pass"
    )
    report, _ = await run(orders, "sh", "-c", f"{sys.executable} -c '{work}' & {sys.executable} -c '{work}'; wait")
    assert 0.6 <= report.part.cpu_seconds < 5
    assert 64 * 2**20 < report.part.peak_memory_bytes < 2**30


async def test_a_supervisor_takes_short_runs_in_turn_and_counts_and_ends_each_for_itself(
    orders: PlannerOfRuns, process: RunnerProcess, tmp_path: Path
) -> None:
    def supervisor_of(run_id: str) -> int:
        [status] = (process.folder / "runner" / "node-7" / "runs").glob(f"{run_id}-*/status")
        return codec.decode(status.read_bytes().splitlines()[0], dict, codec.JSON)["pid"]

    await run(orders, sys.executable, "-c", "held = bytearray(64 * 2**20); sum(range(3_000_000))")
    reports = [(await run(orders, "true"))[0] for _ in range(8)]
    assert len({supervisor_of(report.run_id) for report in reports}) < 4
    assert max(report.part.peak_memory_bytes for report in reports) < 32 * 2**20
    assert min(report.part.cpu_seconds for report in reports) < 0.03
    # SIGUSR2 ends a run, but not the next one of the same supervisor, where it comes late.
    script = 'until [ -e "$0" ]; do sleep 0.02; done; exit 5'
    ordered = a_run("sh", "-c", script, str(tmp_path / "go"), job=next(_jobs))
    await orders.push(ordered)
    await orders.state(ordered.run_id, JobState.RUNNING)
    pid = supervisor_of(ordered.run_id)
    os.kill(pid, signal.SIGUSR2)
    (tmp_path / "go").touch()
    code = (await orders.ended(ordered.run_id)).part.exit_code
    assert (code == 5) is (pid in {supervisor_of(report.run_id) for report in reports})


async def test_progress_is_reported_as_it_is_printed(orders: PlannerOfRuns) -> None:
    script = "echo ::progress 0.25; sleep 0.4; echo ::progress 42%; until [ -e /nothing ]; do sleep 0.1; done"
    ordered = a_run("sh", "-c", script, job=next(_jobs))
    await orders.push(ordered)
    await orders.until(lambda: (found := orders.reports.get(ordered.run_id)) and found.progress == 0.42)
    await orders.push(replace(ordered, verb=RunVerb.STOP, spec=None, grace_seconds=0.0))
    await orders.ended(ordered.run_id)


async def test_what_is_printed_reaches_the_bus_as_it_comes_and_at_the_end(
    orders: PlannerOfRuns, client: Client
) -> None:
    ordered = a_run(
        "sh", "-c", "echo first; until [ -e $0 ]; do sleep 0.02; done; echo last", "/nothing", job=next(_jobs)
    )
    live: list[bytes] = []
    subject = subjects.log_subject("node-7", ordered.job_id, 0, "*", "alice")

    async def hear(message: object) -> None:
        live.append(codec.decode(message.data, LogChunk).data)  # type: ignore[attr-defined]

    subscription = await client.subscribe(subject, cb=hear)
    await orders.push(ordered)
    await orders.until(lambda: b"first\n" in live)
    await orders.push(replace(ordered, verb=RunVerb.STOP, spec=None, grace_seconds=0.0))
    await orders.ended(ordered.run_id)

    [chunk] = [chunk for chunk in await all_chunks(client, ordered) if chunk.ended]
    assert (chunk.offset, chunk.data) == (0, b"first\n")
    await subscription.unsubscribe()


@pytest.mark.long
async def test_output_of_a_gibibyte_is_bounded_on_the_bus_and_readable_at_both_ends(
    orders: PlannerOfRuns, client: Client
) -> None:
    size = 2**30
    program = (
        "import sys\n"
        "numbers = b''.join(b'%015d\\n' % number for number in range(2**16))\n"
        "for part in range(2**10): sys.stdout.buffer.write(numbers if part in (0, 2**10 - 1) else b'x' * 2**20)\n"
    )
    ordered = a_run(sys.executable, "-c", program, job=next(_jobs))
    await orders.push(ordered)
    report = await orders.ended(ordered.run_id)
    assert size_of(report) == size

    found = await all_chunks(client, ordered)
    assert len(found) <= 4 + 16 + 1  # head, tail, and the last piece for those who follow
    assert differences(report, found) == []
    head = b"".join(chunk.data for chunk in found[:4])
    assert (len(head), head[:16]) == (4 * LOG_CHUNK_BYTES, b"000000000000000\n")
    assert found[-1].offset + len(found[-1].data) == size
    tail = {chunk.offset for chunk in found[4:] if len(chunk.data) == LOG_CHUNK_BYTES}
    assert tail == {size - n * LOG_CHUNK_BYTES for n in range(1, 17)}
    os.unlink(report.part.log_file)


async def test_no_secret_is_in_arguments_or_left_on_disk(orders: PlannerOfRuns, process: RunnerProcess) -> None:
    secret = "hunter2-in-the-environment"
    ordered = a_run("sleep", "300", job=next(_jobs), environment={"TOKEN": secret})
    await orders.push(ordered)
    await orders.state(ordered.run_id, JobState.RUNNING)
    # The command alone has it, in its environment: neither the supervisor nor the runner.
    assert set(processes_with(secret.encode()).values()) == {b"sleep\x00300\x00"}
    await orders.push(replace(ordered, verb=RunVerb.STOP, spec=None, grace_seconds=0.0))
    await orders.ended(ordered.run_id)
    [folder] = (process.folder / "runner" / "node-7" / "runs").glob(f"{ordered.run_id}-*")
    await orders.until(lambda: not (folder / "order").exists())
    files = [*folder.iterdir(), *(process.folder / "runner" / "node-7" / name for name in ("ended", "journal"))]
    assert not any(secret.encode() in file.read_bytes() for file in files)


async def test_an_output_that_was_replaced_by_a_link_is_not_published(
    orders: PlannerOfRuns, client: Client, tmp_path: Path
) -> None:
    output = tmp_path / "out-%j-%a"
    private = tmp_path / "private"
    private.write_text("only for the runner\n")
    script = (
        'until [ -e "$0/go" ]; do sleep 0.02; done; rm "$0"/out-*; ln -s private "$0/out-$CORRAL_JOB_ID-0"; sleep 0.5'
    )
    ordered = a_run("sh", "-c", script, str(tmp_path), job=next(_jobs), output=str(output))
    (tmp_path / "go").touch()
    await orders.push(ordered)
    report = await orders.ended(ordered.run_id)
    assert report.part.log_file == str(tmp_path / f"out-{ordered.job_id}-0")

    assert {chunk.data for chunk in await all_chunks(client, ordered)} == {b""}


@pytest.fixture
def account() -> Iterator[pwd.struct_passwd]:
    """An account that jobs may run as; made and removed where there is none."""
    if os.geteuid() != 0:
        pytest.skip("only root may switch accounts")
    usual = (each for each in pwd.getpwall() if 1000 <= each.pw_uid < 60000 and each.pw_shell.endswith("sh"))
    if (found := next(usual, None)) is not None:
        yield found
        return
    if shutil.which("useradd") is None:
        pytest.skip("there is no account that jobs may run as, nor useradd")
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", "corral-test"], check=True)
    yield pwd.getpwnam("corral-test")
    subprocess.run(["userdel", "--remove", "corral-test"], check=False, capture_output=True)


@pytest.fixture
def accounts() -> Iterator[list[pwd.struct_passwd]]:
    """Two accounts, made for the test."""
    if os.geteuid() != 0 or shutil.which("useradd") is None:
        pytest.skip("only root may make accounts and switch to them")
    names = ("corral-test-1", "corral-test-2")
    for name in names:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", name], check=True)
    yield [pwd.getpwnam(name) for name in names]
    for name in names:
        subprocess.run(["userdel", "--remove", name], check=False, capture_output=True)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that every account may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


async def test_a_job_runs_as_the_account_of_its_owner(
    client: Client, bus: EmbeddedServer, reachable: Path, account: pwd.struct_passwd
) -> None:
    options = ("--executor", "process", "--accounts", f"carol={account.pw_name}")
    runner = RunnerProcess(bus.url, reachable / "state", *options, host="node-8")
    secret = reachable / "secret"
    secret.write_text("of root")
    secret.chmod(0o600)
    script = f"id -un; id -u; echo $HOME $USER; cat {secret}; umask"
    try:
        async with planner_of_runs(client, "node-8") as planner:
            await planner.until(lambda: planner.token)
            report, out = await run(planner, "sh", "-c", script, owner="carol", directory="")
            assert report.part.message == ""
            lines = out.splitlines()
            assert lines[:3] == [account.pw_name, str(account.pw_uid), f"{account.pw_dir} {account.pw_name}"]
            assert "Permission denied" in lines[3]
            assert os.stat(report.part.log_file).st_uid == account.pw_uid
            # What the account may not write is not opened with the rights of the runner.
            report, _ = await run(planner, "true", owner="carol", output=str(secret))
            assert (report.part.exit_code, secret.read_text()) == (126, "of root")
            # A session has the account, too, and no more rights.
            ordered = a_run("sleep", "300", job=next(_jobs), owner="carol", directory="")
            await planner.push(ordered)
            await planner.state(ordered.run_id, JobState.RUNNING)
            words = ("sh", "-c", f"id -un; pwd; stat -c %U $(tty); cat {secret}")
            said, _ = await inside(client, ordered.run_id, *words, owner="carol", host="node-8", terminal=True)
            name = account.pw_name
            assert said.splitlines()[:3] == [name, account.pw_dir, name]
            assert "Permission denied" in said
            for owner, why in (("root", "system account"), ("daemon", "system account"), ("no-such", "no account")):
                ordered = a_run("true", job=next(_jobs), owner=owner)
                await planner.push(ordered)
                assert why in (await planner.state(ordered.run_id, JobState.FAILED)).part.message
    finally:
        runner.stop()
        runner.end_runs()


@pytest.mark.long
async def test_a_storm_of_jobs_of_two_accounts_keeps_them_apart(
    client: Client, bus: EmbeddedServer, reachable: Path, accounts: list[pwd.struct_passwd]
) -> None:
    """Many starts at once, and kill -9 of the runner: each runs once, as its account, and sees its own alone."""
    owners = dict(zip(("carol", "dave"), accounts, strict=True))
    options = ["--executor", "process"]
    for owner, account in owners.items():
        options += ["--accounts", f"{owner}={account.pw_name}"]
    runner = RunnerProcess(bus.url, reachable / "state", *options, host="node-9")
    started = reachable / "started"
    started.mkdir()
    started.chmod(0o1777)
    # Of the others it may read neither orders nor environments, outputs nor scripts.
    script = (
        '#!/bin/sh\necho $$ >> "$1/$CORRAL_JOB_ID"; id -u; id -G; echo "$TOKEN"\n'
        'cat "$2"/runner/node-9/runs/*/* "$2"/runner/node-9/work/*/* 2>/dev/null\n'
        "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep ^TOKEN= | sort -u\n"
    )
    numbers = range(5000, 5080)
    runs = {
        number: a_run(
            job=number,
            owner=(owner := ("carol", "dave")[number % 2]),
            script=script,
            arguments=[str(started), str(runner.folder)],
            environment={"TOKEN": f"secret-of-{owner}"},
            directory="/tmp",
        )
        for number in numbers
    }
    try:
        async with planner_of_runs(client, "node-9") as planner:
            await planner.until(lambda: planner.token)
            await planner.push(*runs.values())
            await planner.until(lambda: len(list(started.iterdir())) > 10)
            runner.kill()
            runner.start()
            for number, ordered in runs.items():
                report = await planner.ended(ordered.run_id)
                assert (report.part.state, report.part.exit_code) == (JobState.DONE, 0), report
                account = owners[ordered.owner]
                uid, groups, token, *others = printed(report).splitlines()
                assert (uid, token) == (str(account.pw_uid), f"secret-of-{ordered.owner}")
                assert set(groups.split()) == set(map(str, os.getgrouplist(account.pw_name, account.pw_gid)))
                another = "dave" if ordered.owner == "carol" else "carol"
                assert f"TOKEN=secret-of-{ordered.owner}" in others
                assert not [line for line in others if f"secret-of-{another}" in line]
                assert os.stat(report.part.log_file).st_uid == account.pw_uid
                assert len((started / str(number)).read_text().split()) == 1
    finally:
        runner.stop()
        runner.end_runs()


async def test_it_is_said_that_nothing_confines_jobs(bus: EmbeddedServer, process: RunnerProcess) -> None:
    async with asyncio.timeout(30):
        while "jobs without an image are not confined: they are plain processes" not in process.log.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    async with connected_client(bus.url) as found, asyncio.timeout(30):
        while (said := await confinement(found)).level == "ok":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert (said.level, "devices of others on node-7" in said.detail) == ("note", True)


async def test_a_run_that_no_complete_orders_name_is_ended(orders: PlannerOfRuns) -> None:
    ordered = a_run("sleep", "300", job=next(_jobs))
    await orders.push(ordered)
    await orders.state(ordered.run_id, JobState.RUNNING)
    del orders.runs[ordered.run_id]
    report = await orders.ended(ordered.run_id)
    assert (report.part.signal, report.part.message) == (signal.SIGTERM, "the planner does not know it")
