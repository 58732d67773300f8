"""One dashboard and one browser, shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.browser import DashboardProcess, chromium
from support.local_cluster import LocalCluster


@pytest.fixture(scope="session")
def dashboard(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DashboardProcess]:
    """On the cluster that all tests share."""
    made = DashboardProcess(tmp_path_factory.mktemp("dashboard") / "state", cluster.url)
    made.user("olga", "operator")
    made.user("rita", "requester")
    made.user("vera", "viewer")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    with chromium() as started:
        yield started
