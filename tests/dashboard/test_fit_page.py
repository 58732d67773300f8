"""The page about models to serve, in a real browser, on a real cluster of simulated GPUs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from corral.client import SyncClient
from corral.client.model_files.known import known_models
from support.browser import DashboardProcess, open_tab
from support.local_cluster import LocalCluster

pytestmark = pytest.mark.long


def test_a_model_is_described_fitted_split_and_its_commands_are_copied(
    cluster: LocalCluster, dashboard: DashboardProcess, browser: Any
) -> None:
    config = known_models()["Llama-3-8B"].config
    with dashboard.logged_in("vera") as session:  # viewers may ask, since nothing is leased
        tab = open_tab(browser, dashboard, session, permissions=["clipboard-read", "clipboard-write"])
        page = tab.go("/fit")
        page.select_option("[name=known]", "Llama-3-8B")
        page.fill("[name=sequences]", "4")
        page.click("button:has-text('Fit')")
        page.wait_for_selector(".verdict.good:has-text('Fits on one GPU')")
        page.wait_for_selector(".fact-value:text-is('15.0 GiB')")  # of weights
        tab.until("location.search === '?known=Llama-3-8B&sequences=4'")
        page.click("section:has(> .bar b:text-is('vllm')) button:has-text('Copy')")
        page.wait_for_selector("button:has-text('Copied')")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert "vllm serve meta-llama/Meta-Llama-3-8B" in copied
        page.wait_for_selector("section:has(> .bar b:text-is('llama.cpp')):has-text('llama.cpp loads GGUF files')")

        # Figures rest on a profile, and say so.
        page.click("summary:has-text('More')")
        page.fill("[name=profile]", '[[rate]]\ndevice = "*"\nmemory_bytes_per_second = 1e11\nsource = "our node"')
        tab.until("location.search.includes('profile=')")
        page.click("button:has-text('Fit')")
        page.wait_for_selector(".note:has-text('measured (our node)')")

        # A file is put into the text field, and what it lacks is said as the client says it.
        page.click("[data-value=config]")
        novel = json.dumps({**config, "architectures": ["NovelForCausalLM"]}).encode()
        page.set_input_files(
            "input[type=file]", {"name": "config.json", "mimeType": "application/json", "buffer": novel}
        )
        tab.until("location.search.includes('NovelForCausalLM')")
        page.click("button:has-text('Fit')")
        page.wait_for_selector("[role=alert]:has-text(\"architecture 'NovelForCausalLM' is not known\")")
        assert page.locator(".fit-memory").count() == 0, "the plans of another model are gone"

        # More than one GPU holds, as somebody sees it whom the link was sent to.
        page = tab.go("/fit?source=numbers&params=70B&layers=80&hidden=8192&heads=64&kv_heads=8&plan=1")
        page.wait_for_selector(".verdict.good:has-text('Fits on several GPUs')")
        page.wait_for_selector(".fit-plans tr.here")
        with SyncClient(cluster.url) as client:
            named = {f"{device.host} · GPU {device.index}" for device in client.devices()}
        drawn = page.locator(".fit-device-name a").all_inner_texts()
        assert len(drawn) >= 2
        assert set(drawn) <= named
        assert page.locator(".fit-memory .fit-weights").count() == len(drawn)
        assert page.locator(".fit-track i").count() == page.locator(".fit-stage").count()
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.complaints == []
        page.context.close()
