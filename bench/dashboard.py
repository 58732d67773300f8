"""Does the dashboard stay fluent on a large fleet: what a browser waits for, and what each further browser costs?

A real bus, planner and simulated collector, a real dashboard and headless Chromium (software rendering):

- first map: from opening the page until the map is painted;
- paint: one painting of all cells, and the same cells beside it as elements of the page (peer), and as a heat map of
  ECharts (peer), each changed as a whole;
- frames: the gaps between frames while the mouse crosses the map for some seconds; the limit is an empty page's;
- update: bytes that one browser gets for each look at the fleet; the limit is a byte a device, raw;
- server: CPU seconds per minute with one browser and with several.

    python bench/dashboard.py [--devices 5000] [--browsers 5]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from corral.cli.local.server import EmbeddedServer
from corral.client import CorralError, connect
from corral.dashboard.security.login_links import login_link
from playwright.async_api import Page, async_playwright
from servers import cpu_seconds

CORRAL = (sys.executable, "-m", "corral.cli.main")
PAINTED = "Number(document.querySelector('.heat')?.dataset.devices) === {devices}"
FRAMES = """(seconds) => new Promise((done) => {
    const gaps = []; let before = performance.now(); const end = before + 1000 * seconds;
    const step = (now) => {
        gaps.push(now - before); before = now;
        if (now < end) requestAnimationFrame(step); else done(gaps.slice(1));
    };
    requestAnimationFrame(step);
})"""
# A change counts from its first line until the frame that shows it is done.
ROUNDS = """
    const took = [];
    for (let round = 0; round < 12; round++) {
        await new Promise((next) => requestAnimationFrame(next));
        const began = performance.now();
        change(round);
        await new Promise((next) => requestAnimationFrame(() => setTimeout(next)));
        took.push(performance.now() - began);
    }
"""
CANVAS = f"""async (devices) => {{
    const heat = document.querySelector(".heat"), component = getElement(Number(heat.id.slice(1)));
    const change = (round) => {{
        for (let n = 0; n < devices; n++) component.levels[n] = (n * 7 + round * 31) % 251;
        component.draw();
    }};
    {ROUNDS}
    return took;
}}"""
ELEMENTS = f"""async (devices) => {{
    const box = document.createElement("div");
    box.style.cssText = "position:absolute;top:0;left:0;width:1100px;display:flex;flex-wrap:wrap;gap:2px;z-index:99";
    const cells = [];
    for (let n = 0; n < devices; n++) {{
        const cell = document.createElement("div");
        cell.style.cssText = "width:9px;height:9px;border-radius:2px";
        cells.push(box.appendChild(cell));
    }}
    document.body.append(box);
    const change = (round) => cells.forEach((cell, n) => {{
        cell.style.background = `hsl(${{(n * 7 + round * 31) % 360}} 60% 50%)`;
    }});
    {ROUNDS}
    box.remove();
    return took;
}}"""
ECHARTS = f"""async (devices) => {{
    const {{ echarts }} = await import("nicegui-echart");
    const box = document.createElement("div");
    box.style.cssText = "position:absolute;top:0;left:0;width:1100px;height:600px;z-index:99";
    document.body.append(box);
    const chart = echarts.init(box), across = 100;
    const change = (round) => {{
        const data = [];
        for (let n = 0; n < devices; n++) data.push([n % across, Math.floor(n / across), (n * 7 + round * 31) % 100]);
        chart.setOption({{
            animation: false, xAxis: {{ type: "category" }}, yAxis: {{ type: "category" }},
            visualMap: {{ min: 0, max: 100, show: false }}, series: [{{ type: "heatmap", data, progressive: 0 }}],
        }});
        chart.getZr().flush();
    }};
    {ROUNDS}
    chart.dispose();
    box.remove();
    return took;
}}"""


def median(values: list[float]) -> float:
    return statistics.median(values[2:] if len(values) > 4 else values)


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


async def fleet_is_there(url: str, devices: int) -> None:
    async with connect(url, patience=30.0) as client:
        while True:
            try:
                if (await client.fleet()).usable_devices >= devices:
                    break
            except CorralError:
                pass
            await asyncio.sleep(0.5)
        for n in range(40):
            await client.request(gpus=1 + n % 4, memory="10GiB", owner=f"owner-{n % 7}", ttl="1h")


async def measure(url: str, link: str, options: argparse.Namespace, pid: int) -> None:
    devices: int = options.devices
    ready = PAINTED.format(devices=devices)
    base = link.split("/login")[0]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        context = await browser.new_context(viewport={"width": 1360, "height": 900})
        first = await context.new_page()
        await first.goto(link)
        await first.wait_for_function(ready)
        empty = await context.new_page()
        idle = await empty.evaluate(FRAMES, options.seconds)
        await empty.close()
        opened: list[float] = []
        for _ in range(3):
            began = time.perf_counter()
            await first.goto(f"{base}/")
            await first.wait_for_function(ready, polling=10)
            opened.append(1000 * (time.perf_counter() - began))
        print(f"first map                {min(opened):8.0f} ms   best of three, scripts from the cache")
        canvas = median(await first.evaluate(CANVAS, devices))
        elements = median(await first.evaluate(ELEMENTS, devices))
        charts = median(await first.evaluate(ECHARTS, devices))
        print(f"paint, this canvas       {canvas:8.1f} ms")
        print(f"  elements of the page   {elements:8.1f} ms   {elements / canvas:6.1f} times")
        print(f"  heat map of ECharts    {charts:8.1f} ms   {charts / canvas:6.1f} times")
        box = await first.locator(".heat-cells").bounding_box()
        assert box is not None

        async def wander() -> None:
            end = time.monotonic() + options.seconds
            n = 0
            while time.monotonic() < end:
                n += 1
                await first.mouse.move(box["x"] + (n * 17) % box["width"], box["y"] + (n * 11) % 500)
                await asyncio.sleep(0.016)

        gaps, _ = await asyncio.gather(first.evaluate(FRAMES, options.seconds), wander())
        for name, found in (("frames under the mouse", gaps), ("  an empty page", idle)):
            p50, p95 = quantile(found, 0.5), quantile(found, 0.95)
            print(f"{name:24} {p50:8.1f} ms p50, {p95:.1f} ms p95, {max(found):.1f} ms worst")
        await first.close()
        for count in (1, options.browsers):
            await filter_counters(context, base, ready, count, pid, options.seconds)
        await browser.close()


async def filter_counters(context: Any, base: str, ready: str, count: int, pid: int, seconds: float) -> None:
    received: list[int] = []
    pages: list[Page] = []

    def on_socket(socket: Any) -> None:
        socket.on("framereceived", lambda frame: received.append(len(frame)))

    for _ in range(count):
        page = await context.new_page()
        page.on("websocket", on_socket)
        await page.goto(f"{base}/")
        await page.wait_for_function(ready)
        pages.append(page)
    await asyncio.sleep(2)
    received.clear()
    began, used = time.monotonic(), cpu_seconds(pid)
    await asyncio.sleep(2 * seconds)
    took = time.monotonic() - began
    looks = max(1.0, took / 2)
    per_look = sum(received) / count / looks
    name = f"{count} browser{'s' if count > 1 else ''}"
    minute = 60 * (cpu_seconds(pid) - used) / took
    print(f"update, {name:16} {per_look / 1000:8.1f} kB  a look and browser")
    print(f"server, {name:16} {minute:8.1f} s   of CPU a minute")
    for page in pages:
        await page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=5000)
    parser.add_argument("--browsers", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each thing that is watched")
    options = parser.parse_args()
    hosts = options.devices // 8
    options.devices = 8 * hosts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = EmbeddedServer(folder / "nats")
        server.start()
        environment = os.environ | {"CORRAL_NATS_URL": server.url, "CORRAL_CONFIG": os.devnull}
        collect = ("--source", "simulated", "--hosts", str(hosts), "--devices", "8", "--interval", "2s")
        commands = (
            ("plan",),
            ("collect", *collect, "--background", "0.5", "--processes", "0", "--state", str(folder / "collector")),
            ("dashboard", "--port", "0", "--state", str(folder / "dashboard")),
        )
        running: list[subprocess.Popen[bytes]] = []
        try:
            for command in commands:
                log = (folder / f"{command[0]}.log").open("wb")
                running.append(subprocess.Popen([*CORRAL, *command], env=environment, stdout=log, stderr=log))
            asyncio.run(asyncio.wait_for(fleet_is_there(server.url, options.devices), 120))
            end = time.monotonic() + 60
            while (link := login_link(folder / "dashboard")) is None:
                if time.monotonic() > end or running[2].poll() is not None:
                    sys.exit((folder / "dashboard.log").read_text())
                time.sleep(0.1)
            print(f"{options.devices:,} devices, a look every 2 s; {platform.machine()}, {os.cpu_count()} cores")
            asyncio.run(measure(server.url, link, options, running[2].pid))
        finally:
            for process in reversed(running):
                process.terminate()
                process.wait(20)
            server.stop()


if __name__ == "__main__":
    main()
