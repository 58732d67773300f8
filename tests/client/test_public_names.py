"""The names that programs may import from Corral. A name that is missing here breaks programs: deprecate it first."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from corral.client import Client, SyncClient
from corral.client.jobs.calls import JobCalls
from corral.client.jobs.sync import SyncJobCalls
from corral.client.notifications import NotifyCalls
from corral.client.sync_notifications import SyncNotifyCalls

ROOT = Path(__file__).parents[2]
PUBLIC = {
    "corral.client": {
        *("Client", "SyncClient", "connect", "lease", "HeldLease", "OnOutage", "QueryResult"),
        *("CorralError", "Unavailable", "NoService", "TimedOut", "Rejected", "LeaseLost", "Forked"),
        *("ServiceError", "InvalidRequest", "NotFound", "Ended", "NotOwner", "Conflict", "Refused"),
        *("TooManyRequests", "QueryFailed", "load_ipython_extension"),
        *("submit", "map", "as_completed", "progress", "SubmittedJob", "LogPiece"),
    },
    "corral.schemas": {
        *("WorkRequest", "WorkItem", "Distribution", "Placement", "Method", "WeightBy", "Preemption"),
        *("GpuRange", "Resize", "ResizeKind"),
        *("Assignment", "Grant", "Lease", "LeaseState", "LeaseEvent", "LeaseEventKind"),
        *("Rejection", "RejectionCode", "Reason", "Explanation", "Addition"),
        *("DeviceStatus", "FleetSummary", "QueueEntry", "ProcessorStatus", "ResultFormat"),
        *("Group", "GroupTree", "Resources", "Groups", "GroupStatus"),
        *("NewsKind", "NotifyRule", "Notifications"),
        *("Window", "WindowStatus", "Repeat", "IdleRule", "IdleAction", "IdleNotice", "Moves", "Move"),
        *("Job", "JobSpec", "JobState", "JobTask", "TaskPart", "JobListing", "Jobs", "JobFilter", "JobDetails"),
        *("JobAction", "JobVerb", "JobEvent", "Dependency", "Condition"),
        *("DeviceSample", "SampleBatch", "ProcessBatch", "ProcessSample", "DeviceEvent", "AttributionKind"),
        *("codec", "columns", "subjects"),
    },
}
"""Every other module and name is private: it may change in any version."""


@pytest.mark.parametrize("name", PUBLIC)
def test_a_package_exports_its_public_names_and_no_others(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) == PUBLIC[name]
    for public in PUBLIC[name]:
        assert getattr(module, public) is not None
    # Beside them: submodules, once something has imported them, and what the module itself imports from Python.
    others = {key for key, value in vars(module).items() if key[0] != "_" and not isinstance(value, ModuleType)}
    assert others <= PUBLIC[name] | {"annotations", "ModuleType", "TYPE_CHECKING", "import_module"}


ONLY_ASYNC = {
    *("nc", "forked", "page"),
    # A service that asks for others, and calls that others are made of.
    *("speaking_for", "granted", "fit_work"),
}
"""Public names that have no twin without asyncio: they are about the connection, or for other parts."""


@pytest.mark.parametrize(
    ("calls", "twin"), [(Client, SyncClient), (JobCalls, SyncJobCalls), (NotifyCalls, SyncNotifyCalls)]
)
def test_programs_without_asyncio_have_the_same_calls(calls: type, twin: type) -> None:
    found = {name for name in dir(calls) if name[0] != "_"} - ONLY_ASYNC
    assert found - set(dir(twin)) == set()
    for name in found:
        made, other = getattr(calls, name), getattr(twin, name)
        if callable(made) and name != "renew":  # which has one more argument, for the client's own use
            assert list(inspect.signature(made).parameters) == list(inspect.signature(other).parameters), name


def test_the_contract_is_loaded_when_it_is_used() -> None:
    code = "import sys, corral.schemas; assert not any(m.startswith('corral.schemas.') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def examples() -> Iterator[tuple[str, str]]:
    """Python programs in the documentation, each with its place."""
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)):
            yield f"{path.relative_to(ROOT)}#{number}", block
    for path in (ROOT / "docs/examples").rglob("*.py"):
        yield str(path.relative_to(ROOT)), path.read_text()


def test_examples_import_public_names_only() -> None:
    private: list[str] = []
    found = 0
    for place, source in examples():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "corral"]
                found += len(modules)
                private += [f"{place}: {module}" for module in modules if module not in PUBLIC]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "corral":
                found += 1
                names = PUBLIC.get(node.module or "", set())
                private += [f"{place}: {node.module}.{alias.name}" for alias in node.names if alias.name not in names]
    assert private == []
    assert found > 5
