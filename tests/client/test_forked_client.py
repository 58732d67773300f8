"""A client in a fork of its process: it fails at once and leaves the parent's connection alone."""

from __future__ import annotations

import subprocess
import sys

from support.local_cluster import LocalCluster, environment

SCRIPT = """
import asyncio, multiprocessing, os, sys
from corral.client import Forked, SyncClient, connect, lease

def forked(work):
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            sys.stdout.flush()
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def raises(work):
    try:
        work()
    except Forked as error:
        print("raised", str(os.getppid()) in str(error))

with SyncClient() as client:
    with lease(gpus=1, ttl=60, hosts="any") as held, client.lease(gpus=1, ttl=60) as other:
        for work in (client.devices, held.check, lambda: client.release(held.lease_id), lambda: next(client.watch())):
            print(forked(lambda: raises(work)))
        def leave():
            client.close()
            other.client  # what it knows can be read
            sys.exit(0)
        print("closed", forked(leave))
        context = multiprocessing.get_context("fork")
        child = context.Process(target=raises, args=(client.queue,))
        child.start()
        child.join()
        pid = os.fork()
        if pid == 0:
            sys.exit(0)  # through the end of both blocks
        os.waitpid(pid, 0)
        held.check()
        print("held", {one.lease_id for one in client.leases()} == {held.lease_id, other.lease_id})
    print("released", client.leases() == [])

async def main():
    async with connect() as client:
        async with client.lease(gpus=1, hosts="any") as held:
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                try:
                    await client.devices()
                except Forked:
                    print("async raised", flush=True)
                os._exit(0)
            os.waitpid(pid, 0)
            print("async held", len(await client.leases()))

asyncio.run(main())
"""


def test_a_fork_raises_and_leaves_the_parent_what_it_holds(cluster: LocalCluster) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment(CORRAL_NATS_URL=cluster.url, CORRAL_OWNER="forking"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    printed = done.stdout.replace("async held 1", "async held")
    assert printed.splitlines() == [
        *(["raised True", "3"] * 4),
        "closed 3",
        "raised True",
        "held True",
        "released True",
        "async raised",
        "async held",
    ], done.stderr
    assert done.returncode == 0
