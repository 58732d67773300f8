"""The gateway as its callers see it: a real bus with authentication, a planner, a processor and a simulated fleet."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import jsonschema
import pytest
from corral.bus.access.reload import reload
from corral.bus.access.roles import Role
from corral.gateway import openapi
from support import infinity
from support.gateway_rig import GatewayRig, bearer, running_rig, token
from support.local_cluster import invoke, wait_for

pytestmark = pytest.mark.long

SECONDS = 20.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayRig]:
    with running_rig(tmp_path_factory.mktemp("gateway")) as made:
        yield made


@pytest.fixture
def alice(rig: GatewayRig) -> Iterator[httpx.Client]:
    with rig.person("alice") as client:
        yield client
        for lease in client.get("/v1/leases", params={"owner": "alice"}).json()["leases"]:
            client.post("/v1/release", json={"lease_id": lease["lease_id"]})


@pytest.fixture
def bob(rig: GatewayRig) -> Iterator[httpx.Client]:
    with rig.person("bob") as client:
        yield client


def granted(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/request", json={"gpus": 1, "ttl_seconds": 120, "allow_in_use": True, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["lease"]


def schema_of(document: dict[str, Any], path: str, method: str, status: int) -> dict[str, Any]:
    response = document["paths"][path][method]["responses"][str(status)]
    if "$ref" in response:
        response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
    return {**response["content"]["application/json"]["schema"], "components": document["components"]}


def test_a_caller_acts_under_its_own_name_and_touches_nothing_of_others(
    rig: GatewayRig, alice: httpx.Client, bob: httpx.Client
) -> None:
    lease = granted(alice)
    assert lease["owner"] == "alice"
    for body in ({}, {"owner": "alice"}):
        for path in ("renew", "release"):
            answer = bob.post(f"/v1/{path}", json={"lease_id": lease["lease_id"], **body})
            assert answer.status_code == 403, answer.text
    assert bob.post("/v1/request", json={"owner": "alice"}).status_code == 403
    renewed = alice.post("/v1/renew", json={"lease_id": lease["lease_id"], "owner": "alice", "ttl_seconds": 90})
    assert renewed.json()["state"] == "active"
    assert alice.post("/v1/release", json={"lease_id": lease["lease_id"]}).json()["state"] == "released"
    assert alice.post("/v1/renew", json={"lease_id": lease["lease_id"]}).status_code == 410
    assert alice.post("/v1/renew", json={"lease_id": "none"}).status_code == 404
    # A rejection has an error's status, so that `curl --fail` sees it.
    rejected = alice.post("/v1/request", json={"gpus": 400})
    assert (rejected.status_code, rejected.json()["code"]) == (409, "impossible")
    with rig.person("portal") as portal:
        assert granted(portal, owner="carol")["owner"] == "carol"
        unnamed = portal.post("/v1/request", json={"gpus": 1})
        assert (unnamed.status_code, unnamed.json()["field"]) == (400, "$.owner")
        for owner in ("*", ">", "a.>", "a b", "..", 7):
            assert portal.post("/v1/request", json={"owner": owner}).status_code == 400
        leases = portal.get("/v1/leases", params={"owner": "carol"}).json()["leases"]
        assert portal.post("/v1/release", json={"lease_id": leases[0]["lease_id"], "owner": "carol"}).status_code == 200


def forged(text: str, **fields: str) -> str:
    """A token with other names in it, and the same key."""
    word = text.removeprefix("corral_")
    content = json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
    return "corral_" + base64.urlsafe_b64encode(json.dumps(content | fields).encode()).rstrip(b"=").decode()


def test_names_in_a_token_give_no_rights(rig: GatewayRig) -> None:
    bobs = token(rig.bus, "bob")
    with httpx.Client(base_url=rig.url, timeout=30) as client:
        asked = client.post("/v1/request", json={"gpus": 1}, headers=bearer(forged(bobs, owner="alice")))
        assert (asked.status_code, asked.json()["code"]) == (403, "refused")
        assert client.get("/v1/fleet", headers=bearer(forged(bobs, user="alice"))).status_code == 401
        drain = {"drain": True, "hosts": ["*"], "reason": "mine"}
        promoted = client.post("/v1/drain", json=drain, headers=bearer(forged(bobs, role="operator")))
        assert promoted.status_code == 403
        for wrong in ("corral_", "corral_e30", "x", forged(bobs, owner="a.>"), forged(bobs, user="_INBOX.>")):
            assert client.get("/v1/fleet", headers=bearer(wrong)).status_code == 401
        for name in ("planner", "processor", "collector", "http"):
            assert client.get("/v1/fleet", headers=bearer(token(rig.bus, name))).status_code == 403
        assert client.get("/v1/fleet").headers["WWW-Authenticate"].startswith("Bearer")


def test_roles_are_those_of_the_bus(rig: GatewayRig, alice: httpx.Client) -> None:
    with rig.person("vera") as vera, rig.person("olga") as olga:
        assert vera.get("/v1/devices").status_code == 200
        assert vera.post("/v1/request", json={"gpus": 1}).status_code == 403
        drain = {"drain": True, "hosts": ["nowhere"], "reason": "tried"}
        assert alice.post("/v1/drain", json=drain).status_code == 403
        drained = olga.post("/v1/drain", json={**drain, "hosts": ["sim-0002"]})
        assert "tried" in json.dumps(drained.json()["drains"])
        assert olga.post("/v1/drain", json={"drain": False, "hosts": ["sim-0002"]}).json()["drains"] == {}
        assert olga.post("/v1/drain", json={**drain, "operator": "alice"}).status_code == 403


def test_fields_are_named_where_they_are_wrong_or_unknown(alice: httpx.Client) -> None:
    misspelt = alice.post("/v1/request", json={"gpu": 1})
    assert (misspelt.status_code, misspelt.json()["field"]) == (400, "$.gpu")
    unknown = alice.post("/v1/request", json={"gpus": 400, "frobnicate": True})
    assert "frobnicate" in unknown.headers["Corral-Warnings"]
    assert "frobnicate" in unknown.json()["warnings"][0]
    for path, field in (
        ("leases?limit=x", "$.limit"),
        ("leases?limit=null", "$.limit"),
        ("leases?ownr=alice", "$.ownr"),
        ("leases?owner=a&owner=b", "$.owner"),
        ("jobs?states=asleep", "$.states[0]"),
        ("history_status?x=1", ""),
    ):
        answer = alice.get(f"/v1/{path}")
        assert (answer.status_code, answer.json()["field"]) == (400, field), answer.text
    several = alice.get("/v1/leases", params={"states": ["released", "expired"], "hosts": "sim-0001", "limit": "2"})
    assert several.status_code == 200
    assert alice.get("/v1/jobs", params={"active": "true"}).json()["jobs"] == []


def test_answers_are_what_the_document_says(rig: GatewayRig, alice: httpx.Client) -> None:
    document = openapi.as_dict()
    lease = granted(alice, name="documented")
    asked = [
        *(("get", name, {}) for name in ("leases", "devices", "fleet", "queue", "jobs", "groups", "windows")),
        ("get", "history_status", {}),
        ("post", "explain", {"request": {"gpus": 2}}),
        ("post", "moves", {"free_hosts": 1}),
        ("post", "request", {"gpus": 400}),
        ("post", "request", {"gpus": "many"}),
        ("post", "renew", {"lease_id": lease["lease_id"]}),
        ("post", "withdraw", {"request_id": "never-asked"}),
        ("post", "query", {"sql": "SELECT 1 AS one"}),
        ("post", "query", {"sql": "SELECT"}),
        ("post", "query_cancel", {"query_id": "none"}),
    ]
    for method, name, body in asked:
        answer = alice.request(method, f"/v1/{name}", **({"json": body} if method == "post" else {}))
        jsonschema.validate(answer.json(), schema_of(document, f"/v1/{name}", method, answer.status_code))
    assert alice.get("/openapi.json").json() == json.loads(openapi.document())


def queued(client: httpx.Client) -> list[str]:
    return [entry["request_id"] for entry in client.get("/v1/queue").json()["entries"]]


def test_a_request_waits_by_long_polls_events_and_a_held_answer(alice: httpx.Client, bob: httpx.Client) -> None:
    body = {"gpus": 4, "hosts": ["sim-0001"], "ttl_seconds": 60, "wait_seconds": 60, "allow_in_use": True}
    held = granted(bob, **body, request_id="bobs")
    polled = alice.post("/v1/request", json=body, headers={"Prefer": "wait=1"})
    assert (polled.status_code, polled.json()["type"]) == (202, "queue")
    assert int(polled.headers["Retry-After"]) >= 1
    own = polled.json()["entries"][0]["request_id"]
    assert queued(alice) == [own], "it keeps its place between two polls"
    again = {**body, "request_id": own}
    assert alice.post("/v1/request", json=again, headers={"Prefer": "respond-async, wait=1"}).status_code == 202
    # Whoever goes away without an id of its own leaves nothing behind.
    with pytest.raises(httpx.ReadTimeout):
        alice.post("/v1/request", json={**body, "name": "gone"}, timeout=1.5)
    wait_for(lambda: queued(alice) == [own])
    events: list[tuple[str, dict[str, Any]]] = []

    def follow() -> None:
        headers = {"Accept": "text/event-stream"}
        with alice.stream("POST", "/v1/request", json=again, headers=headers) as stream:
            assert stream.headers["Content-Type"] == "text/event-stream"
            kind = ""
            for line in stream.iter_lines():
                kind = line.removeprefix("event: ") if line.startswith("event: ") else kind
                if line.startswith("data: "):
                    events.append((kind, json.loads(line.removeprefix("data: "))))

    following = threading.Thread(target=follow)
    following.start()
    wait_for(lambda: events)
    assert bob.post("/v1/release", json={"lease_id": held["lease_id"]}).status_code == 200
    following.join(60)
    kinds = [kind for kind, _ in events]
    assert kinds == ["queued"] * (len(kinds) - 1) + ["assignment"]
    lease = events[-1][1]["lease"]
    assert (lease["owner"], lease["request_id"]) == ("alice", own)
    # The same body under the same id has the same answer.
    assert alice.post("/v1/request", json=again).json()["lease"]["lease_id"] == lease["lease_id"]
    assert alice.post("/v1/request", json={**again, "gpus": 1}).status_code == 409


def read_to_end(client: httpx.Client, query: dict[str, Any]) -> None:
    with client.stream("POST", "/v1/query", json=query) as stream:
        assert stream.status_code == 200
        for _ in stream.iter_bytes():
            pass


def test_rows_come_in_the_format_that_is_asked_for_and_what_is_not_for_readers_does_not(alice: httpx.Client) -> None:
    answer = alice.post("/v1/query", json={"sql": "SELECT 42 AS n, TIMESTAMPTZ '2026-01-02 03:04:05+00' AS t"})
    assert answer.json()["rows"] == [[42, "2026-01-02T03:04:05.000000Z"]]
    assert json.loads(answer.headers["Corral-End"])["rows"] == 1
    many = {"sql": "SELECT range AS i FROM range(400000)", "format": "csv"}
    lines = alice.post("/v1/query", json=many).text.splitlines()
    assert (lines[0], len(lines), lines[-1]) == ("i", 400_001, "399999")
    for sql, status in (
        ("SELECT * FROM read_text('/etc/passwd')", 403),
        ("ATTACH '/tmp/x.duckdb'", 403),
        ("SELECT", 400),
    ):
        assert alice.post("/v1/query", json={"sql": sql}).status_code == status, sql
    # Of a query that fails after its first rows the end is missing.
    late = "SELECT CASE WHEN range < 2900000 THEN range ELSE error('late') END AS i FROM range(3000000)"
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        read_to_end(alice, {"sql": late, "format": "csv", "limit": 3_000_000})
    slow = {"sql": "SELECT count(*) FROM range(400000) a, range(400000) b", "query_id": "abandoned"}
    with pytest.raises(httpx.ReadTimeout):
        alice.post("/v1/query", json=slow, timeout=1.0)
    wait_for(lambda: alice.post("/v1/query_cancel", json={"query_id": "abandoned"}).status_code == 404)


def test_lease_events_are_followed(alice: httpx.Client) -> None:
    with alice.stream("GET", "/v1/lease_events", params={"owner": "alice", "kind": "released"}) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith(":")
        lease = granted(alice)
        alice.post("/v1/release", json={"lease_id": lease["lease_id"]})
        event = next(json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
    assert (event["kind"], event["lease"]["lease_id"]) == ("released", lease["lease_id"])
    assert alice.get("/v1/lease_events", params={"lease_id": "a.>"}).status_code == 400
    assert alice.get("/v1/job_events", params={"job_id": "*"}).status_code == 400


def test_jobs_are_submitted_listed_and_cancelled_by_their_owner(alice: httpx.Client, bob: httpx.Client) -> None:
    spec = {"request": {"owner": "alice", "gpus": 1}, "command": ["true"], "held": True}
    assert bob.post("/v1/submit", json=spec).status_code == 403
    job = alice.post("/v1/submit", json={**spec, "request": {"gpus": 1}})
    assert job.status_code == 200, job.text
    job_id = job.json()["job_id"]
    assert alice.get("/v1/jobs", params={"job_ids": job_id}).json()["jobs"][0]["job"]["held"]
    assert bob.post("/v1/job", json={"job_id": job_id, "verb": "cancel"}).status_code == 403
    assert bob.post("/v1/job_override", json={"action": {"job_id": job_id, "verb": "cancel"}}).status_code == 403
    assert alice.get("/v1/logs", params={"job_id": job_id}).text == ""
    assert alice.get("/v1/logs", params={"job_id": "99999"}).status_code == 404
    assert alice.get("/v1/logs", params={"job_id": "x"}).json()["field"] == "$.job_id"
    cancelled = alice.post("/v1/job", json={"job_id": job_id, "verb": "cancel"})
    assert cancelled.json()["job"]["state"] == "cancelled", cancelled.text


def test_a_revoked_token_is_refused_at_once_also_where_it_was_in_use(rig: GatewayRig, alice: httpx.Client) -> None:
    rig.bus.add(Role.REQUESTER, "mallory")
    reload(rig.bus.server.pid_file)
    for _ in range(2):
        granted(alice, gpus=4)
    with rig.person("mallory") as mallory, ThreadPoolExecutor() as threads:
        wait_for(lambda: mallory.get("/v1/fleet").status_code == 200, 20)
        body = {"gpus": 1, "wait_seconds": 600}
        waiting = [
            threads.submit(mallory.post, "/v1/request", json=body | more, headers=headers)
            for more, headers in (({}, {}), ({"request_id": "kept"}, {}), ({}, {"Prefer": "wait=500"}))
        ]
        wait_for(lambda: alice.get("/v1/queue", params={"owner": "mallory"}).json()["total"] == 3)
        with mallory.stream("GET", "/v1/lease_events") as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith(":")
            rig.bus.authority.revoke("mallory")
            reload(rig.bus.server.pid_file)
            wait_for(lambda: mallory.get("/v1/fleet").status_code == 401, 20)
            assert mallory.post("/v1/request", json={"gpus": 1}).status_code == 401
            # What it was waiting for and following ends, too.
            assert [each.result(SECONDS).status_code for each in waiting] == [401] * 3
            began = time.monotonic()
            with contextlib.suppress(httpx.HTTPError):
                for _ in lines:
                    assert time.monotonic() - began < 60
    # The planner drops what waits in 30 s; nothing is to be granted to it in the tests that follow.
    with rig.person("portal") as portal:
        for entry in alice.get("/v1/queue", params={"owner": "mallory"}).json()["entries"]:
            portal.post("/v1/withdraw", json={"request_id": entry["request_id"], "owner": "mallory"})
    assert alice.get("/v1/queue", params={"owner": "mallory"}).json()["total"] == 0


def test_no_secret_is_logged_and_the_gateway_reports_its_health(rig: GatewayRig, alice: httpx.Client) -> None:
    with httpx.Client(base_url=rig.url) as client:
        in_url = client.get("/v1/fleet", params={"token": "corral_secret-in-url"})
        assert in_url.status_code == 400
        client.get("/corral_secret-in-path")
        client.get("/v1/fleet", headers={"Authorization": "Basic corral_secret-in-header"})
        assert client.get("/-/ready").status_code == client.get("/-/healthy").status_code == 200
    alice.get("/v1/groups")
    wait_for(lambda: "GET /v1/groups: 200 for alice" in rig.log, 10)
    # Nor has any of the requests before been a surprise.
    assert "Traceback" not in rig.log
    for secret in ("corral_", "secret", *(token(rig.bus, name)[-40:] for name in ("alice", "bob"))):
        assert secret not in rig.log
    own = {"CORRAL_NATS_CREDS": rig.bus.credentials("vera")}
    checked = invoke("health", "gateway", "--json", url=rig.bus.server.url, **own)
    assert checked.returncode == 0, checked.stderr
    measures = {each["name"]: each for each in json.loads(checked.stdout)["services"][0]["measures"]}
    assert measures["callers"]["value"] >= 1


def test_every_panel_of_the_history_board_gets_its_columns(rig: GatewayRig, alice: httpx.Client) -> None:
    """As Grafana's Infinity plugin asks; the token is a viewer's."""
    lease = granted(alice, name="boarded", gpus=2)
    alice.post("/v1/request", json={"gpus": 400})
    board, now = infinity.board("corral-history"), datetime.now(UTC)
    targets = [(panel["title"], target) for panel in board["panels"] for target in panel["targets"]]
    hosts = next(each for each in board["templating"]["list"] if each["name"] == "host")
    viewer = token(rig.bus, "vera")
    everything = {"host:singlequote": hosts["allValue"]}

    def rows(target: dict[str, Any], days: float, variables: dict[str, str]) -> list[dict[str, Any]]:
        def fill(text: str) -> str:
            start, end = now - timedelta(days=days), now + timedelta(minutes=10)
            return infinity.filled(text, start, end, 60_000, variables)

        with httpx.Client(timeout=60) as client:
            found, answer = infinity.asked(client, rig.url, viewer, target, fill)
        assert answer.status_code == 200, (answer.text, fill(target["url_options"]["data"]))
        assert answer.headers["Content-Type"].startswith("text/csv")
        return found

    def boarded() -> bool:
        held = rows(dict(targets)["GPU-hours by owner"], 0.1, everything)
        seen = rows(dict(targets)["GPUs seen"], 0.1, everything)
        return any(row["owner"] == "alice" and row["gpu_hours"] > 0 for row in held) and seen == [{"devices": 8.0}]

    wait_for(boarded)
    known = [row["host"] for row in rows(hosts["query"]["infinityQuery"], 1, {})]
    assert known == ["sim-0001", "sim-0002"]
    found = {title: rows(target, 0.1, everything) for title, target in targets}
    for title in (
        "GPUs seen",
        "Mean utilization",
        "Utilization by host",
        "GPUs leased, by owner",
        "Power",
        "Hottest GPU",
    ):
        assert found[title], title
    assert found["GPUs seen"] == [{"devices": 8.0}]
    assert {row["host"] for row in found["Utilization by host"]} == set(known)
    assert max(row["gpus"] for row in found["GPUs leased, by owner"] if row["owner"] == "alice") > 0
    assert found["Requests turned down"][0]["rejected"] >= 1
    assert found["Longest waits"][0]["asked_at"] <= now + timedelta(minutes=10)
    one = {"host:singlequote": "'sim-0001'"}
    assert {row["host"] for row in rows(dict(targets)["Utilization by host"], 0.1, one)} == {"sim-0001"}
    # Beyond 36 hours the same panels read hours.
    assert rows(dict(targets)["GPUs seen"], 30, everything) == [{"devices": 8.0}]
    provisioned = infinity.source("corral")
    assert provisioned["uid"] == board["templating"]["list"][0]["current"]["value"]
    assert all(provisioned["url"].startswith(host) for host in provisioned["jsonData"]["allowedHosts"])
    assert provisioned["jsonData"]["customHealthCheckUrl"] == provisioned["url"] + "/-/ready"
    alice.post("/v1/release", json={"lease_id": lease["lease_id"]})


def test_a_gateway_that_stops_sends_those_who_wait_elsewhere(rig: GatewayRig, alice: httpx.Client) -> None:
    body = {"gpus": 4, "hosts": ["sim-0002"], "ttl_seconds": 60, "allow_in_use": True}
    held = granted(alice, **body)
    log = rig.bus.folder / "http.log"
    before = log.read_text().count("served at")
    with rig.bus.part("http", "serve-http", "--listen", "127.0.0.1:0") as second:
        wait_for(lambda: log.read_text().count("served at") > before)
        url = log.read_text().rpartition("served at ")[2].split()[0]
        answers: dict[str, httpx.Response] = {}

        def ask(name: str, **fields: str) -> None:
            with httpx.Client(base_url=url, headers=bearer(token(rig.bus, "bob")), timeout=60) as bob:
                answers[name] = bob.post("/v1/request", json={**body, "wait_seconds": 60, **fields})

        asking = [threading.Thread(target=ask, args=("unnamed",))]
        asking.append(threading.Thread(target=ask, args=("named",), kwargs={"request_id": "stays"}))
        for thread in asking:
            thread.start()
        wait_for(lambda: len(queued(alice)) == 2)
        second.terminate()
        for thread in asking:
            thread.join(60)
        assert second.wait(30) == 0
    assert {name: answer.status_code for name, answer in answers.items()} == {"unnamed": 503, "named": 503}
    assert queued(alice) == ["stays"], "who can't ask for it again has left nothing in the queue"
    with rig.person("bob") as bob:
        bob.post("/v1/withdraw", json={"request_id": "stays"})
    alice.post("/v1/release", json={"lease_id": held["lease_id"]})
