"""The bus over a WebSocket: what only that needs is not imported by a command until a server's URL asks for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from corral.cli.local.server import EmbeddedServer

ASK = """
import asyncio, sys
from corral.bus import websockets
websockets.leave_out()
from corral.bus.connect import connect
assert "aiohttp" not in sys.modules and "multidict" not in sys.modules
async def ask():
    client = await connect(sys.argv[1])
    await client.flush()
    print(client.connected_url.scheme, "aiohttp" in sys.modules)
    await client.close()
asyncio.run(ask())
"""


def test_a_server_is_reached_by_websocket_and_the_others_need_nothing_for_it(tmp_path: Path) -> None:
    include = tmp_path / "websocket.conf"
    include.write_text('websocket { listen: "127.0.0.1:-1", no_tls: true }\n')
    server = EmbeddedServer(tmp_path / "nats", include=include)
    server.start()
    try:
        found = re.search(r"websocket clients on (ws://\S+)", (tmp_path / "nats" / "nats-server.log").read_text())
        assert found is not None
        seen = [
            subprocess.run([sys.executable, "-c", ASK, url], capture_output=True, text=True, check=True).stdout.split()
            for url in (found[1], server.url)
        ]
    finally:
        server.kill()
    assert seen == [["ws", "True"], ["nats", "False"]]
