"""Start one `torchrun` on each host of an assignment; the first host is the rendezvous.

python torchrun.py --gpus 16 --memory 40GiB -- train_ddp.py            # by ssh
python torchrun.py --gpus 8 --start local -- train_ddp.py              # all on this machine, to try it
python torchrun.py --gpus 16 --start print -- train_ddp.py             # only print the commands
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections import Counter

from corral.client import HeldLease, LeaseLost, Rejected, lease


def commands(held: HeldLease, script: list[str], *, address: str, port: int) -> dict[str, list[str]]:
    """Command to start on each host; the first host of the assignment has rank 0."""
    gpus = Counter(grant.host for grant in held.grants)
    started: dict[str, list[str]] = {}
    for rank, host in enumerate(held.hosts):
        environment = [f"{name}={value}" for name, value in held.environment_of(host).items()]
        started[host] = [
            *("env", *environment, "python3" if address == held.hosts[0] else sys.executable),
            *("-m", "torch.distributed.run", "--nnodes", str(len(held.hosts)), "--node-rank", str(rank)),
            *("--nproc-per-node", str(gpus[host]), "--master-addr", address, "--master-port", str(port)),
            *script,
        ]
    return started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gpus", type=int, default=2)
    arguments.add_argument("--memory", default="8GiB", help="free memory on each GPU")
    arguments.add_argument("--placement", default="fewest_hosts", choices=["same_host", "fewest_hosts", "spread"])
    arguments.add_argument("--wait", default="10m")
    arguments.add_argument("--port", type=int, default=29500, help="rendezvous port on the first host")
    arguments.add_argument("--start", default="ssh", choices=["ssh", "local", "print"])
    arguments.add_argument("script", nargs="+", help="-- SCRIPT [ARGUMENT]...")
    wanted = arguments.parse_args()

    try:
        with lease(
            gpus=wanted.gpus, memory=wanted.memory, placement=wanted.placement, wait=wanted.wait, name="torchrun"
        ) as held:
            address = "127.0.0.1" if wanted.start == "local" else held.hosts[0]
            nodes = commands(held, wanted.script, address=address, port=wanted.port)
            if wanted.start == "print":
                for host, command in nodes.items():
                    print(f"{host}: {shlex.join(command)}")
                return
            running = [
                subprocess.Popen(command if wanted.start == "local" else ["ssh", host, shlex.join(command)])
                for host, command in nodes.items()
            ]
            try:
                while any(process.poll() is None for process in running):
                    held.check()
                    if any(process.poll() for process in running):
                        break  # one node failed: the others would wait for it forever
                    time.sleep(0.2)
            finally:
                for process in running:
                    process.terminate()
                codes = [process.wait() for process in running]
            if any(codes):
                raise SystemExit(f"exit codes by host: {dict(zip(nodes, codes, strict=True))}")
    except Rejected as rejected:
        raise SystemExit(f"no GPUs: {rejected}") from None
    except LeaseLost as lost:
        raise SystemExit(f"the lease was lost: {lost}") from None


if __name__ == "__main__":
    main()
