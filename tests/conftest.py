"""What tests share: a real NATS server each, with Corral's streams and buckets in it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.bus.connect import connect
from corral.bus.layout import ensure_layout
from corral.cli.local.server import EmbeddedServer
from corral.client import SyncClient
from corral.processors.storage import Database
from hypothesis import HealthCheck, is_hypothesis_test, settings
from nats.aio.client import Client
from support.local_cluster import LocalCluster, wait_for

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# A busy machine makes examples slowly, which says nothing of what is tested.
settings.register_profile("corral", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("corral")
ALL_EXAMPLES = os.environ.get("CORRAL_EXAMPLES") == "all"
"""Whether properties are tried on all of their examples, as `make test-long` does; otherwise on a quarter."""
FEW_EXAMPLES = 10
"""Number of examples that a property has at least, where it is given as many."""

# What jsonschema checks IRIs by takes seconds to import, in each worker, and no schema of ours has any.
sys.modules.setdefault("rfc3987_syntax", None)  # pyright: ignore[reportArgumentType]

# DuckDB's threads wait for each other over a few rows: one needs two thirds of the CPU time of two.
assert Database.__init__.__kwdefaults__
Database.__init__.__kwdefaults__["threads"] = 1

# Started in the background (`nohup make test &`), the tests would hand on to commands that these are to be ignored.
for _number, _usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A NATS server with JetStream on a free loopback port; stopped after the test."""
    embedded = EmbeddedServer(tmp_path / "nats")
    embedded.start()
    yield embedded
    embedded.kill()


@pytest.fixture
async def nc(server: EmbeddedServer) -> AsyncIterator[Client]:
    """A connection to `server`, with the layout of streams and buckets made."""
    client = await connect(server.url, name="test")
    await ensure_layout(client.jetstream())
    yield client
    await client.close()


@pytest.fixture
def shared_data() -> Path:
    """The folder of real production data; the test is skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data is not on this machine (looked in {SHARED_DATA})")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _idle_cluster(request: pytest.FixtureRequest) -> None:  # pyright: ignore[reportUnusedFunction]
    """A test with the shared cluster begins once what earlier ones ran there is seen to be gone."""
    made = request.getfixturevalue("cluster") if "cluster" in request.fixturenames else None
    if isinstance(made, LocalCluster) and not made.credentials:
        made.start()
        with SyncClient(made.url, owner="conftest") as client:
            wait_for(lambda: not any(device.in_use for device in client.devices()), 60)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that share the cluster come one after the other: one worker starts it and ends it."""
    items.sort(key=lambda item: not _shares_cluster(item))
    if not ALL_EXAMPLES:
        properties = {item.function for item in items if isinstance(item, pytest.Function) and not item.cls}
        for one in filter(is_hypothesis_test, properties):
            _draw_fewer(one)


def _draw_fewer(one: Any) -> None:
    """Take a quarter of the examples of a property; each run draws others."""
    given: settings = one._hypothesis_internal_use_settings
    few = min(given.max_examples, max(FEW_EXAMPLES, given.max_examples // 4))
    one._hypothesis_internal_use_settings = settings(given, max_examples=few)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the shared cluster behind the last test that needs it: it takes a quarter of a core all the while."""
    if (shared := _shared.get("cluster")) and _shares_cluster(item) and not (nextitem and _shares_cluster(nextitem)):
        shared.stop()


def _shares_cluster(item: pytest.Item) -> bool:
    return "cluster" in getattr(item, "fixturenames", ())


_shared: dict[str, LocalCluster] = {}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A whole cluster on simulated GPUs, shared by all tests that break nothing."""
    _shared["cluster"] = made = LocalCluster(tmp_path_factory.mktemp("cluster") / "data")
    yield made
    made.stop()
