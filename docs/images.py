"""Pictures of a real cluster on simulated GPUs: for the documentation (`make images`), of all pages (`make screens`).

usage: python docs/images.py [top] [dashboard] [screens]
"""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import dashboard_images
from corral.cli.local.server import EmbeddedServer
from corral.cli.local.supervisor import Part, Supervisor
from corral.cli.local.up import cluster_parts, wait_until_ready
from corral.cli.top.app import TopApp
from corral.cli.top.rows import HISTORY
from corral.client import connect
from corral.client.fleet_view import FleetView

IMAGES = Path(__file__).parent / "images"
SCREENS = Path(__file__).parent.parent / "build" / "screens"
SIMULATED = ("--source", "simulated", "--hosts", "3", "--devices", "8", "--interval", "250ms", "--processes", "2s")
LIVELY = ("--time-scale", "30", "--background", "0.3", "--seed", "4")


def plain(svg: str) -> str:
    """A picture that fetches no fonts: any monospaced one will do."""
    return re.sub(r"@font-face\s*{[^}]*}", "", svg).replace(
        "Fira Code,", "Fira Code, DejaVu Sans Mono, Menlo, Consolas,"
    )


async def pictures(url: str) -> None:
    async with connect(url, owner="alice") as alice:
        await alice.request(gpus=4, memory="40GiB", name="train-llama", models="*H100*", ttl="1h")
        await alice.request(share=0.5, memory="10GiB", name="notebook", owner="bob", ttl="1h")
        await alice.request(gpus=2, memory="20GiB", name="eval", owner="carol", models="*A100*", ttl="1h")
        uuid = (await alice.devices())[-1].uuid
        await alice.drain(devices=[uuid], reason="new fan", operator="dan")
        board = FleetView(alice, history=HISTORY)
        app = TopApp(board, interval=0.5)
        async with app.run_test(size=(118, 30)) as pilot:
            await pilot.pause(30)
            (IMAGES / "top.svg").write_text(plain(app.export_screenshot(title="corral top")))
            await pilot.press("3", "enter", "home", "enter")
            await pilot.pause(1)
            (IMAGES / "device.svg").write_text(plain(app.export_screenshot(title="corral top: a device")))


async def with_cluster(simulated: Sequence[str], take: Callable[[Supervisor, Path], Awaitable[None]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        collector = Part(name="collector", arguments=["collect", *simulated, "--state", f"{folder}/collector"])
        parts = cluster_parts(folder, collector)
        supervisor = Supervisor(EmbeddedServer(folder / "nats"), parts, folder / "logs", print)
        try:
            await supervisor.start()
            await wait_until_ready(supervisor.server.url, parts)
            await take(supervisor, folder)
        finally:
            await supervisor.stop()


async def main(wanted: Sequence[str]) -> None:
    for folder in (IMAGES, SCREENS):
        folder.mkdir(parents=True, exist_ok=True)
    if "top" in wanted:
        await with_cluster([*SIMULATED, *LIVELY], lambda supervisor, _: pictures(supervisor.server.url))
    for name, shoot, images in (
        ("dashboard", dashboard_images.shoot, IMAGES),
        ("screens", dashboard_images.shoot_all, SCREENS),
    ):
        if name in wanted:
            await with_cluster(
                [*dashboard_images.SIMULATED, *dashboard_images.LIVELY],
                partial(dashboard_images.pictures, take=partial(shoot, images=images)),
            )


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:] or ("top", "dashboard")))
