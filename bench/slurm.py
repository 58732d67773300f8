"""Slurm for comparison: the array and the single jobs of `bench/jobs.py`, on as many hosts with as many slots.

One `slurmctld`, one `slurmd` for each host and `munged`, all on the loopback interface, in a folder of their own, as
this user (root). It needs the Debian packages slurmctld, slurmd, slurm-client and munge:

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
    python bench/slurm.py [--tasks 1000] [--hosts 4] [--parameters SchedulerParameters]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from corral.bus import processes
from granting import PER_HOST
from job_requests import cpu_seconds_of

SUBMITTED = 30
START_SECONDS = 30.0
CONTROLLER_PORT = 16817
FIRST_PORT = 17001
POLL_SECONDS = 0.1


def configuration(folder: Path, hosts: int, parameters: str) -> str:
    """Content of `slurm.conf`: the defaults, but for what one machine without systemd and accounting needs."""
    name = socket.gethostname()
    lines = {
        "ClusterName": "bench",
        "SlurmctldHost": f"{name}(127.0.0.1)",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket",
        "CredType": "cred/munge",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SlurmctldPort": str(CONTROLLER_PORT),
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
        "SlurmdSpoolDir": f"{folder}/spool.%n",
        "StateSaveLocation": f"{folder}/state",
        "SlurmctldLogFile": f"{folder}/slurmctld.log",
        "SlurmdLogFile": f"{folder}/slurmd.%n.log",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "MaxArraySize": "10001",
        "MaxJobCount": "20000",
        "ReturnToService": "2",
        # The nodes have more slots than this machine has cores.
        "SlurmdParameters": "config_overrides",
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
    }
    if parameters:
        lines["SchedulerParameters"] = parameters
    nodes = (
        f"NodeName=node[0-{hosts - 1}] NodeHostname={name} NodeAddr=127.0.0.1 "
        f"Port=[{FIRST_PORT}-{FIRST_PORT + hosts - 1}] CPUs={PER_HOST} State=UNKNOWN"
    )
    text = "".join(f"{key}={value}\n" for key, value in lines.items())
    return f"{text}{nodes}\nPartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


class Slurm:
    """Slurm's daemons, and its commands.

    Args:
        folder: for all that they write.
        hosts: number of hosts.
        parameters: `SchedulerParameters`; empty for the defaults.

    Attributes:
        daemons: by name.
    """

    def __init__(self, folder: Path, hosts: int, parameters: str) -> None:
        self._folder = folder
        file = folder / "slurm.conf"
        file.write_text(configuration(folder, hosts, parameters))
        self._environment = os.environ | {"SLURM_CONF": str(file)}
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        socket_option = f"--socket={folder}/munge.socket"
        self.daemons = {"munged": self._start("munged", "--foreground", "--force", socket_option, *files)}
        while not (folder / "munge.socket").exists():
            time.sleep(POLL_SECONDS)
        self.daemons["slurmctld"] = self._start("slurmctld", "-D", "-f", str(file))
        for number in range(hosts):
            self.daemons[f"slurmd {number}"] = self._start("slurmd", "-D", "-f", str(file), "-N", f"node{number}")
        end = time.monotonic() + START_SECONDS
        while self.command("sinfo", "-h", "-o", "%T %D").strip() != f"idle {hosts}":
            if time.monotonic() > end:
                raise RuntimeError(self.command("sinfo") + (folder / "slurmctld.log").read_text()[-2000:])
            time.sleep(POLL_SECONDS)

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        nowhere = subprocess.DEVNULL
        return subprocess.Popen(words, env=self._environment, stdin=nowhere, stdout=nowhere, stderr=nowhere)

    def command(self, *words: str) -> str:
        """What a command prints."""
        found = subprocess.run(words, env=self._environment, capture_output=True, text=True, check=False)
        return found.stdout

    def submit(self, *words: str) -> str:
        """Submit a job without output, and return its id."""
        return self.command("sbatch", "--parsable", "--output=/dev/null", *words).strip()

    def until_ended(self, job_id: str) -> None:
        """Wait until a job has ended."""
        while self.command("squeue", "-h", "-j", job_id, "-t", "PENDING,RUNNING,COMPLETING").strip():
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """End the daemons."""
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()


def reaped_seconds() -> float:
    """CPU time of the orphans that have ended, which this process has adopted: those of steps, with their commands."""
    seconds = 0.0
    with contextlib.suppress(ChildProcessError):
        while (ended := os.wait4(-1, os.WNOHANG))[0] != 0:
            seconds += ended[2].ru_utime + ended[2].ru_stime
    return seconds


def measure_latency(slurm: Slurm, folder: Path) -> None:
    """Time from submitting to a process that runs, on idle hosts."""
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    file = os.open(pipe, os.O_RDWR)
    took: list[float] = []
    after: list[float] = []
    for _ in range(SUBMITTED):
        began = time.perf_counter()
        job_id = slurm.submit(f"--wrap=echo > {pipe}")
        submitted = time.perf_counter()
        os.read(file, 16)
        now = time.perf_counter()
        took.append(now - began)
        after.append(now - submitted)
        slurm.until_ended(job_id)
    os.close(file)
    print(
        f"sbatch to process running: p50 {statistics.median(took) * 1000:.0f} ms, "
        f"of which after sbatch has ended {statistics.median(after) * 1000:.0f} ms"
    )


def measure_starts(slurm: Slurm, tasks: int) -> None:
    """Starts a second of an array, and the CPU time that each part has spent on a task."""

    def spent() -> dict[str, float]:
        return {name: cpu_seconds_of(daemon.pid) for name, daemon in slurm.daemons.items()}

    reaped_seconds()
    before, began = spent(), time.perf_counter()
    slurm.until_ended(slurm.submit("--wrap=/bin/true", f"--array=0-{tasks - 1}"))
    seconds = time.perf_counter() - began
    time.sleep(2.0)
    after = spent()
    print(f"array of {tasks} × /bin/true: {tasks / seconds:.0f} started and ended a second")
    each = {"slurmd": 0.0, "slurmstepd and commands": reaped_seconds()}
    for name, value in after.items():
        kind = name.split()[0]
        each[kind] = each.get(kind, 0.0) + value - before[name]
    words = ", ".join(f"{name} {value / tasks * 1000:.2f}" for name, value in each.items())
    print(f"CPU time for each task: {sum(each.values()) / tasks * 1000:.2f} ms ({words})")


@contextlib.contextmanager
def running(hosts: int, parameters: str) -> Iterator[tuple[Slurm, Path]]:
    """Slurm, with its folder, until the end."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        slurm = Slurm(folder, hosts, parameters)
        try:
            yield slurm, folder
        finally:
            slurm.stop()


def main() -> None:
    """Start Slurm, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--parameters", default="", help="SchedulerParameters of slurm.conf")
    args = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("slurmctld") is None:
        raise SystemExit("this needs root and the packages of the header")
    processes.become_subreaper()
    with running(args.hosts, args.parameters) as (slurm, folder):
        print(slurm.command("slurmd", "-V").strip())
        measure_latency(slurm, folder)
        measure_starts(slurm, args.tasks)


if __name__ == "__main__":
    main()
