"""Messages for commands that request devices of this host by default, because they set an environment here."""

from __future__ import annotations

from ...client import Client
from ...client.environment import devices_elsewhere, local_host
from ...client.request import RequestFields
from ...schemas.requests import Lease
from ..options import say


async def explain_missing_host(client: Client, fields: RequestFields) -> None:
    """Explain a rejection if the request was for this host only and the fleet has no devices of this host."""
    mine = local_host()
    if list(fields.get("hosts", ())) == [mine] and not (await client.fleet(hosts=[mine])).devices:
        say(
            f"corral: this host ({mine}) has no devices in the fleet; is `corral collect` running here? "
            "--host any allows any host (--via ssh starts the command there)"
        )


def print_device_hosts(lease: Lease) -> None:
    """Print where the devices of a lease are if none of them is on this host."""
    if message := devices_elsewhere(lease):
        say(f"corral: {message} (corral run --via ssh starts a command there)")
