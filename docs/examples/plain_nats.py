"""A client without Corral's library: the whole API is NATS and JSON.

pip install 'nats-py[nkeys]'; python plain_nats.py
"""

import asyncio
import getpass
import json
import os
import re
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

CREDENTIALS = Path(os.environ["CORRAL_NATS_CREDS"]).read_text() if os.environ.get("CORRAL_NATS_CREDS") else ""
# The file also contains the owner, the user, and the inbox prefix that only this user may subscribe to.
FACTS = dict(re.findall(r"# (\w+): (\S+)", CREDENTIALS))
OWNER = FACTS.get("owner", "*").replace("*", "") or os.environ.get("CORRAL_OWNER") or getpass.getuser()
USER = FACTS.get("user", OWNER)


async def ask(nc: Client, subject: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a request and return its answer; an answer of type `error` has a message that says what to do."""
    reply = json.loads((await nc.request(subject, json.dumps(body).encode(), timeout=10)).data)
    if reply["type"] == "error":
        raise SystemExit(f"{reply['code']}: {reply['message']}")
    return reply


async def main() -> None:
    url = os.environ.get("CORRAL_NATS_URL", "nats://127.0.0.1:4222")
    known: dict[str, Any] = {}
    if seed := re.search(r"^SU[A-Z2-7]{56}$", CREDENTIALS, re.MULTILINE):
        known = {"nkeys_seed_str": seed[0], "inbox_prefix": FACTS["inbox"].encode()}
    nc = await nats.connect(url, **known)

    async def event(message: Msg) -> None:
        change = json.loads(message.data)
        print(f"  event: {change['kind']} {change['lease']['lease_id']}")

    await nc.subscribe("corral.v1.leases.>", cb=event)
    await nc.flush()

    # The server checks the owner, which is the last token of the subject.
    work = {"owner": OWNER, "gpus": 2, "gpu_memory_bytes": 20 * 2**30, "ttl_seconds": 60, "name": "plain-nats"}
    reply = await ask(nc, f"corral.v1.plan.request.{OWNER}", work)
    if reply["type"] == "rejection":
        raise SystemExit(f"rejected: {reply['message']}")
    lease = reply["lease"]
    for grant in lease["grants"]:
        print(f"{grant['host']}:{grant['index']} {grant['model']} {grant['device']}")
    for host, environment in lease["environment"].items():
        # CUDA_VISIBLE_DEVICES, or ROCR_VISIBLE_DEVICES on AMD.
        print(f"on {host}: {' '.join(f'{name}={value}' for name, value in environment.items())}")

    # A lease expires unless it is renewed, so that a client that dies holds nothing.
    mine = {"owner": OWNER, "lease_id": lease["lease_id"]}
    renewed = await ask(nc, f"corral.v1.plan.renew.{OWNER}", mine)
    print(f"renewed until {renewed['expires_at']}")

    sql = "SELECT host, count(*) AS samples FROM samples GROUP BY host ORDER BY host"
    result = await ask(nc, f"corral.v1.query.{USER}", {"sql": sql})
    for host, samples in result["rows"]:
        print(f"{host}: {samples} samples in the history")

    await ask(nc, f"corral.v1.plan.release.{OWNER}", mine)
    await asyncio.sleep(0.5)  # for the last event
    await nc.close()


asyncio.run(main())
