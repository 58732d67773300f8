"""Which host a command means where none is named: this one, wherever it sets an environment here."""

from __future__ import annotations

from ..client import Client
from ..client.environment import elsewhere, local_host
from ..client.request import RequestFields
from ..schemas.requests import Lease
from .options import say


async def explain_host(client: Client, fields: RequestFields) -> None:
    """A rejection on a machine that the fleet does not know has one likely reason: say it."""
    mine = local_host()
    if list(fields.get("hosts", ())) == [mine] and not (await client.fleet(hosts=[mine])).devices:
        say(
            f"corral: this host ({mine}) has no devices in the fleet; is `corral collect` running here? "
            "--host any takes devices of any host (--via ssh starts the command there)"
        )


def say_elsewhere(lease: Lease) -> None:
    """Say where the devices of a lease are, if none of them is here."""
    if message := elsewhere(lease):
        say(f"corral: {message} (corral run --via ssh starts a command there)")
