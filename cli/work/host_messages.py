"""Messages that explain a rejection by what the fleet has."""

from __future__ import annotations

from ...client import Client
from ...client.leases.environment import devices_elsewhere, local_host
from ...client.request import RequestFields
from ...schemas.requests import Lease
from ..options import say


async def explain_missing(client: Client, fields: RequestFields) -> None:
    """Explain a rejection if the fleet has no device of the host or the models that were asked for."""
    models = fields.get("models", ())
    if models and not (await client.fleet(models=models)).devices:
        say(f"corral: {await models_of_fleet(client)}")
    mine = local_host()
    if list(fields.get("hosts", ())) == [mine] and not (await client.fleet(hosts=[mine])).devices:
        say(
            f"corral: this host ({mine}) has no devices in the fleet; is `corral collect` running here? "
            "--host any allows any host (--via ssh starts the command there)"
        )


async def models_of_fleet(client: Client) -> str:
    """The fleet's models with their numbers, for those who asked for others."""
    found = (await client.fleet()).models
    listed = ", ".join(f"{count} × {name}" for name, count in sorted(found.items(), key=lambda item: -item[1]))
    return f"no GPU is of that model; the fleet has {listed}" if listed else "the fleet has no GPU"


def print_device_hosts(lease: Lease) -> None:
    """Print where the devices of a lease are if none of them is on this host."""
    if message := devices_elsewhere(lease):
        say(f"corral: {message} (corral run --via ssh starts a command there)")
