"""Environment variables of a job's processes: none of the runner's, and those of the lease above all others."""

from __future__ import annotations

from itertools import zip_longest
from typing import Final

from ..schemas.limits import LEASE_VARIABLE
from ..schemas.work.jobs import JobSpec
from ..schemas.work.runs import Run
from .accounts import Account

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HIDDEN: Final = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Variables that hide all devices of their vendors when they are empty."""
_FIRST_PORT: Final = 15_000
_PORTS: Final = 15_000
"""Below the ports that Linux gives to outgoing connections (`ip_local_port_range`, from 32768)."""


def master_port(job_id: str, index: int, attempt: int) -> int:
    """Port at which the processes of a task find each other, the same on all its hosts."""
    return _FIRST_PORT + (int(job_id) * 31 + index * 7 + attempt) % _PORTS


def environment_of(run: Run, spec: JobSpec, account: Account, rank_on_host: int = 0) -> dict[str, str]:
    """Environment of one process of a run.

    Args:
        run: the run.
        spec: its job.
        account: that it runs as.
        rank_on_host: number of the process on this host.
    """
    own = {
        "HOME": account.home,
        "USER": account.name,
        "LOGNAME": account.name,
        "SHELL": account.shell,
        "PATH": PATH,
        "LANG": "C.UTF-8",
    }
    hidden = {} if any(grant.device for grant in run.grants) else dict.fromkeys(HIDDEN, "")
    return own | spec.environment | hidden | run.lease_environment | _job(run, spec) | _ranks(run, spec, rank_on_host)


def _job(run: Run, spec: JobSpec) -> dict[str, str]:
    values = {
        LEASE_VARIABLE: run.lease_id,
        "CORRAL_OWNER": run.owner,
        "CORRAL_JOB_ID": run.job_id,
        "CORRAL_JOB_NAME": spec.request.name,
        "CORRAL_ATTEMPT": str(run.attempt),
        "CORRAL_HOSTS": ",".join(run.hosts),
        "CORRAL_ADDRESSES": ",".join(address or host for host, address in zip_longest(run.hosts, run.addresses)),
    }
    if run.index is not None:
        values |= {
            "CORRAL_ARRAY_INDEX": str(run.index),
            "CORRAL_ARRAY_FIRST": str(run.first_index),
            "CORRAL_ARRAY_LAST": str(run.last_index),
            "CORRAL_ARRAY_COUNT": str(run.tasks),
        }
    return values


def _ranks(run: Run, spec: JobSpec, rank_on_host: int) -> dict[str, str]:
    """Variables for `torchrun` and MPI; none for a task of one process."""
    hosts, per_host = max(1, spec.hosts), spec.tasks_per_host
    if hosts == per_host == 1:
        return {}
    first = "127.0.0.1"
    if hosts > 1:
        first = next(filter(None, (*run.addresses[:1], *run.hosts[:1])), "")
    return {
        "MASTER_ADDR": first,
        "MASTER_PORT": str(master_port(run.job_id, run.index or 0, run.attempt)),
        "NODE_RANK": str(run.rank),
        "NNODES": str(hosts),
        "RANK": str(run.rank * per_host + rank_on_host),
        "LOCAL_RANK": str(rank_on_host),
        "WORLD_SIZE": str(hosts * per_host),
        "LOCAL_WORLD_SIZE": str(per_host),
    }
