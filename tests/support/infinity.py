"""What Grafana and its Infinity plugin make of a board: the requests of its panels, and tables of the answers.

As in the plugin's backend (version 3): variables and macros are put into the body as text, a POST goes to the data
source's URL and the query's, with the content type of the query, `Accept` by its type and the data source's token. The
answer is CSV with a header; of the columns that the query names, numbers and times are parsed, and series have to be in
the order of time.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

GRAFANA: Final = Path(__file__).parents[2] / "deploy" / "grafana"
ACCEPT: Final = {"csv": "text/csv; charset=utf-8", "json": "application/json;q=0.9,text/plain"}


def board(name: str) -> dict[str, Any]:
    """A board of `deploy/grafana`."""
    return json.loads((GRAFANA / "dashboards" / f"{name}.json").read_text())


def source(name: str) -> dict[str, Any]:
    """A provisioned data source."""
    [found] = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / f"{name}.yml").read_text())["datasources"]
    return found


def filled(text: str, start: datetime, end: datetime, interval_ms: int, variables: Mapping[str, str]) -> str:
    """Text with Grafana's variables replaced; one that is not known is an error, as nobody would replace it."""
    known = {
        "__from:date:iso": start.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "__to:date:iso": end.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "__interval_ms": str(interval_ms),
        **variables,
    }
    return re.sub(r"\$\{([^}]+)\}", lambda match: known[match[1]], text)


def asked(
    client: httpx.Client, url: str, token: str, target: Mapping[str, Any], fill: Any
) -> tuple[list[dict[str, Any]], httpx.Response]:
    """Send the request of a target, and return its rows."""
    options = target["url_options"]
    answer = client.request(
        options["method"],
        url + target["url"],
        content=fill(options["data"]),
        headers={
            "Content-Type": options["body_content_type"],
            "Accept": ACCEPT[target["type"]],
            "Authorization": f"Bearer {token}",
            "User-Agent": "Grafana/12.1.0",
        },
    )
    if answer.status_code >= 400:
        return [], answer
    rows = list(csv.DictReader(io.StringIO(answer.text), strict=True))
    parsed = [
        {column["text"]: value_of(row[column["selector"]], column["type"]) for column in target["columns"]}
        for row in rows
    ]
    if target["format"] == "timeseries":
        times = [row[column["text"]] for row in parsed for column in target["columns"] if column["type"] == "timestamp"]
        assert times == sorted(times), "Infinity leaves a long table as it is unless its times ascend"
    return parsed, answer


def value_of(text: str, kind: str) -> Any:
    """A cell as the column's type; None for an empty one."""
    if text == "" or kind == "string":
        return text or None
    return float(text) if kind == "number" else datetime.fromisoformat(text)
