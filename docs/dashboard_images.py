"""Pictures of the dashboard, taken with a headless Chromium of a cluster on simulated GPUs: part of `make images`."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from corral.cli.local.supervisor import Part, Supervisor
from corral.client import Client, Rejected, connect
from corral.dashboard.security.login_links import login_link
from corral.schemas.requests import Grant

SIMULATED = ("--source", "simulated", "--hosts", "24", "--devices", "8", "--interval", "1s", "--processes", "2s")
LIVELY = ("--time-scale", "30", "--background", "0.25", "--seed", "7")
WORK = (
    ("alice", "train-llama", 8, "60GiB", "*H100*"),
    ("alice", "train-llama", 8, "60GiB", "*H100*"),
    ("bob", "eval", 2, "20GiB", "*A100*"),
    ("carol", "diffusion", 4, "30GiB", "*A100*"),
    ("carol", "diffusion", 4, "30GiB", "*A100*"),
    ("dave", "embeddings", 6, "20GiB", "*L40S*"),
    ("erin", "finetune", 8, "40GiB", "*A100*"),
    ("erin", "notebook", 1, "10GiB", "*T4*"),
    ("frank", "whisper", 3, "10GiB", "*4090*"),
    ("grace", "sweep", 4, "40GiB", "*MI300*"),
    ("grace", "sweep", 4, "40GiB", "*MI300*"),
)
WARM_SECONDS = 50


async def busy(client: Client) -> None:
    """A day's work, as far as it fits: leases that hold, some that have ended, one that waits, a host on the bench."""
    for owner, name, gpus, memory, model in WORK[2:6]:
        ended = await client.request(owner=owner, name=name, gpus=gpus, memory=memory, models=model, ttl="1h")
        await asyncio.sleep(2)
        await client.release(ended.lease.lease_id, owner=owner)
    for owner, name, gpus, memory, model in WORK:
        try:
            await client.request(owner=owner, name=name, gpus=gpus, memory=memory, models=model, ttl="2h")
        except Rejected as error:
            print(f"{owner}'s {name} found no place: {error}")
        await asyncio.sleep(1)
    devices = await client.devices()
    idle = [device for device in devices if not device.leases]
    await client.drain(devices=[idle[-1].uuid, idle[-2].uuid], reason="new fans", operator="olga")


async def shoot(seen: Dashboard, images: Path) -> None:
    """Take the pictures of the documentation."""
    device, host = f"/device/{quote(seen.grant.device)}?range=5m", f"/host/{quote(seen.grant.host)}?range=1h"
    for name, path, dark, width, height in (
        ("dashboard.png", "/", True, 1360, 860),
        ("dashboard-light.png", "/?metric=temperature", False, 1360, 860),
        ("dashboard-device.png", device, True, 1360, 1000),
        ("dashboard-leases.png", "/leases?range=5m", False, 1360, 1000),
        ("dashboard-host.png", host, False, 1360, 1000),
        ("dashboard-analytics.png", "/analytics?view=usage_by_owner&period=1h", True, 1360, 820),
        (
            "dashboard-request.png",
            "/request?gpus=8&memory=60GiB&models=*H100*&name=train-llama&ttl=1h",
            False,
            1360,
            620,
        ),
        ("dashboard-fit.png", "/fit?source=known&known=Llama-3.1-70B&sequences=64&context=8192", True, 1360, 1500),
        ("dashboard-phone.png", "/", True, 390, 844),
    ):
        await seen.picture(path, images / name, dark=dark, width=width, height=height)


async def shoot_all(seen: Dashboard, images: Path) -> None:
    """Take pictures of each page, whole: in light, in dark, and on a phone."""
    pages = {
        "fleet": "/", "jobs": "/jobs", "job": f"/job/{seen.job}", "leases": "/leases?range=5m", "events": "/events",
        "groups": "/groups", "usage": "/reports?who=all", "analytics": "/analytics?view=usage_by_owner&period=1h",
        "console": "/analytics?view=console", "request": "/request?gpus=2&memory=20GiB",
        "fit": "/fit?source=known&known=Llama-3.1-70B&sequences=64&context=8192",
        "device": f"/device/{quote(seen.grant.device)}?range=5m", "host": f"/host/{quote(seen.grant.host)}?range=1h",
    }  # fmt: skip
    for name, path in pages.items():
        for form, dark, width, height in (
            ("light", False, 1280, 900),
            ("dark", True, 1280, 900),
            ("phone", False, 390, 844),
            ("phone-dark", True, 390, 844),
        ):
            image = images / f"{name}-{form}.png"
            await seen.picture(path, image, dark=dark, width=width, height=height, whole=True)
            print(image)


def smaller(image: Path) -> None:
    """Store a picture with 256 colors, in less than half the bytes; as it is where Pillow is not installed."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        return
    with Image.open(image) as picture:
        picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            image, optimize=True
        )


class Dashboard(NamedTuple):
    """A dashboard in a browser.

    Attributes:
        browser: Chromium.
        base: URL without a path.
        cookies: of somebody who has logged in.
        grant: a device that is held, with its host.
        job: id of a job.
    """

    browser: Any
    base: str
    cookies: Any
    grant: Grant
    job: str

    async def picture(
        self, path: str, image: Path, *, dark: bool, width: int, height: int, whole: bool = False
    ) -> None:
        """Take a picture of a page, as far as it is seen or of all of it."""
        context = await self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        await context.add_cookies(self.cookies)
        page = await context.new_page()
        await page.goto(self.base + path)
        await page.wait_for_load_state("networkidle")
        # What the history is asked for takes its time, on a machine that renders in software as well.
        await page.wait_for_function("!/Asking…|Planning…/.test(document.body.innerText)")
        await asyncio.sleep(1 if whole else 5)
        await page.screenshot(path=image, full_page=whole)
        smaller(image)
        await context.close()


async def pictures(supervisor: Supervisor, folder: Path, take: Callable[[Dashboard], Awaitable[None]]) -> None:
    """Have pictures taken of a cluster as `busy` as that, with the dashboard's state in `folder`."""
    from playwright.async_api import async_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no Chromium on this machine: the dashboard's pictures stay as they are")
        return
    state = folder / "dashboard"
    supervisor.add(Part(name="dashboard", arguments=["dashboard", "--port", "0", "--quiet", "--state", str(state)]))
    async with connect(supervisor.server.url, owner="alice") as alice:
        await busy(alice)
        job = await alice.jobs.submit(["sleep", "600"], gpus=1, name="nightly", array="0-19%4", owner="erin")
        waiting = asyncio.create_task(alice.request(owner="heidi", name="pretrain", gpus=40, placement="fewest_hosts",
                                                    memory="70GiB", models="*H100*", wait="10m"))  # fmt: skip
        await asyncio.sleep(WARM_SECONDS)
        (held,) = (await alice.leases(owner="dave"))[:1]
        link = login_link(state)
        assert link is not None
        base = link.split("/login")[0]
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            context = await browser.new_context()
            await (await context.new_page()).goto(link)
            await take(Dashboard(browser, base, await context.cookies(), held.grants[0], job.job_id))
            await browser.close()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
