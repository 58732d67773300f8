"""Every role against every subject, stream and bucket, on a real server: what is not expected here must be refused.

What is expected is written out by hand, without the table that the server's configuration is made of.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from corral.bus.access.roles import Role
from corral.bus.connect import BusUnavailable, connect
from corral.bus.layout import ensure_layout
from corral.schemas import codec
from corral.schemas.work.runs import RunOrders
from nats.aio.client import Client
from nats.aio.msg import Msg
from support.secured_bus import SecuredBus

V = "corral.v1"
HOSTS = ("node-7", "node-8")
TELEMETRY = ("samples", "processes", "agents", "inventory", "events")
STREAM_OF = {
    "samples": "CORRAL_TELEMETRY",
    "processes": "CORRAL_TELEMETRY",
    "agents": "CORRAL_TELEMETRY",
    "inventory": "CORRAL_INVENTORY",
    "events": "CORRAL_FACTS",
}
STREAMS = ("CORRAL_TELEMETRY", "CORRAL_INVENTORY", "CORRAL_FACTS", "CORRAL_DEAD", "CORRAL_PARTITIONS")
OF_JOBS = ("CORRAL_JOBS", "CORRAL_LOGS", "CORRAL_REPORTS")
BUCKETS = ("corral_planner", "corral_hosts", "corral_processors")
OF_NOTIFIER = "KV_corral_notify"
KEPT = (*STREAMS, *(f"KV_{bucket}" for bucket in BUCKETS), "OTHERS", *OF_JOBS, OF_NOTIFIER)
USERS = {
    Role.COLLECTOR: "node-7",
    Role.RUNNER: "runner-7",
    Role.PROCESSOR: "processor",
    Role.PLANNER: "planner",
    Role.NOTIFIER: "notifier",
    Role.REQUESTER: "alice",
    Role.VIEWER: "vera",
    Role.OPERATOR: "olga",
    Role.GATEWAY: "http",
}
PEOPLE = (Role.REQUESTER, Role.VIEWER, Role.OPERATOR)
LISTS = ("leases", "devices", "fleet", "queue", "groups", "windows", "moves", "jobs")
NAMES = (*USERS.values(), "bob")
NAMED = (
    "request",
    "renew",
    "release",
    "withdraw",
    "drain",
    "evict",
    "set_groups",
    "book",
    "submit",
    "job",
    "job_override",
)


def logs(host: str, owner: str) -> str:
    """Subject of a piece of what a job prints."""
    return f"{V}.logs.{host}.12.0.h0.{owner}"


LOGS = [logs(host, owner) for host in HOSTS for owner in (*NAMES, "team.alice", "alice.team")]
READ_LOGS = [f"$JS.API.DIRECT.GET.CORRAL_LOGS.{subject}" for subject in LOGS]


def attached(host: str, *names: str, override: bool = False) -> set[str]:
    """Subjects of sessions inside the jobs of a host."""
    verbs = ("override", "override_step") if override else ("open", "step")
    return {f"{V}.attach.{verb}.{host}.{name}" for verb in verbs for name in names}


def publish_probes() -> list[str]:
    """Subjects of Corral, of JetStream, of the server and of nobody."""
    found = [f"{V}.{kind}.{host}" for kind in TELEMETRY for host in HOSTS]
    found += [f"{V}.leases.granted.l-1", f"{V}.dead.invalid", f"{V}.unknown", "corral.v2.samples.node-7", "hello"]
    found += [f"{V}.plan.{what}{rest}" for what in (*LISTS, "unknown") for rest in ("", ".alice")]
    for what in NAMED:
        found += [f"{V}.plan.{what}", *(f"{V}.plan.{what}.{name}" for name in NAMES)]
    for what in ("plan.explain", "query", "history.snapshot", "history.read", "notify.rules", "notify.override"):
        found += [f"{V}.{what}", *(f"{V}.{what}.{name}" for name in NAMES)]
    found += [f"{V}.history.{what}{rest}" for what in ("cancel", "status") for rest in ("", ".alice")]
    found += [f"{V}.history.snapshot.read", f"{V}.history.ack.p.q"]
    found += [f"{V}.notify", f"{V}.notify.other", f"{V}.notify.unnamed.rules"]
    found += [f"{V}.health", f"{V}.health.planner", f"{V}.health.collector", f"{V}.health.runner"]
    found += [f"{V}.health.{kind}.{host}" for kind in ("collector", "runner") for host in HOSTS]
    found += [f"{V}.plan.runner", *(f"{V}.{kind}.{host}" for kind in ("plan.runner", "runs") for host in HOSTS)]
    found += [f"{V}.reports.fleet", f"{V}.jobs.12", f"{V}.logs", *LOGS, *READ_LOGS]
    for host, override in itertools.product(HOSTS, (False, True)):
        found += attached(host, *NAMES, "team.alice", "alice.team", override=override)
    found += [f"$SRV.{verb}{rest}" for verb in ("PING", "INFO", "STATS") for rest in ("", ".corral-planner")]
    found += [f"_INBOX.{name}.x" for name in NAMES] + ["_INBOX.x", "_R_.a.b", "$SYS.REQ.SERVER.PING", "$G"]
    found += [f"$KV.corral_hosts.{host}" for host in HOSTS]
    found += ["$KV.corral_planner.leader", "$KV.corral_planner.lease.l-1", "$KV.corral_processors.h.part.x"]
    found += [f"$KV.corral_notify.{key}" for key in ("rules.alice", "out.x")]
    found += [f"$JS.API.{what}" for what in ("INFO", "STREAM.NAMES", "STREAM.LIST", "ACCOUNT.PURGE.A")]
    found += ["$JS.API.META.LEADER.STEPDOWN", "$JS.API.SERVER.REMOVE"]
    for stream in KEPT:
        found += [
            f"$JS.API.STREAM.{verb}.{stream}"
            for verb in (
                *("INFO", "CREATE", "UPDATE", "DELETE", "PURGE", "MSG.GET", "MSG.DELETE"),
                *("SNAPSHOT", "RESTORE", "LEADER.STEPDOWN", "PEER.REMOVE"),
            )
        ]
        found += [f"$JS.API.CONSUMER.{verb}.{stream}" for verb in ("CREATE", "LIST", "NAMES")]
        found += [
            f"$JS.API.CONSUMER.{verb}.{stream}.c"
            for verb in (
                *("CREATE", "DURABLE.CREATE", "INFO", "DELETE", "MSG.NEXT"),
                *("PAUSE", "LEADER.STEPDOWN", "UNPIN", "RESET"),
            )
        ]
        found += [f"$JS.API.CONSUMER.CREATE.{stream}.c.{V}.samples.node-7"]
        found += [f"$JS.API.DIRECT.GET.{stream}", f"$JS.ACK.{stream}.c.1.1.1.1.1", f"$JS.FC.{stream}.c.x"]
    for kind, host in itertools.product(TELEMETRY, HOSTS):
        found.append(f"$JS.API.DIRECT.GET.{STREAM_OF[kind]}.{V}.{kind}.{host}")
    found += [f"$JS.API.DIRECT.GET.KV_corral_hosts.$KV.corral_hosts.{host}" for host in HOSTS]
    found += ["$JS.API.DIRECT.GET.KV_corral_planner.$KV.corral_planner.leader"]
    found += ["$JS.API.DIRECT.GET.KV_corral_processors.$KV.corral_processors.x"]
    found += ["$JS.API.DIRECT.GET.KV_corral_notify.$KV.corral_notify.rules.alice"]
    return found


def subscribe_probes() -> list[str]:
    found = [">", "*.>", "corral.>", f"{V}.>", "$KV.>", "$JS.>", "$SYS.>", "$SRV.>", "_INBOX.>", "_R_.>", "hello"]
    found += [f"_INBOX.{name}.>" for name in NAMES]
    found += [f"{V}.{kind}.*" for kind in (*TELEMETRY, "dead")]
    found += [f"{V}.samples.node-7", f"{V}.leases.>", f"{V}.plan.>", f"{V}.plan.request.alice"]
    found += [f"{V}.query", f"{V}.query.*", f"{V}.query.alice", f"{V}.history.snapshot.*", f"{V}.history.read.olga"]
    found += [f"{V}.history.>", f"{V}.history.snapshot", f"{V}.history.ack.p.*", f"{V}.health", f"{V}.health.>"]
    found += [f"{V}.health.{kind}{rest}" for kind in ("exporter", "gateway", "login") for rest in ("", ".x")]
    found += [f"{V}.health.notifier", f"{V}.health.notifier.x"]
    found += [f"{V}.notify.>", f"{V}.notify.rules", f"{V}.notify.rules.alice", f"{V}.notify.override.olga"]
    for kind in ("collector", "runner"):
        found += [f"{V}.health.{kind}", *(f"{V}.health.{kind}.{host}" for host in HOSTS)]
    found += [f"{V}.jobs.*", f"{V}.runs.*", f"{V}.logs.>", f"{V}.logs.*.*.*.*.>", f"{V}.logs.node-7.>", *LOGS]
    found += [f"{V}.runs.{host}" for host in HOSTS] + [f"{V}.plan.runner.*", f"{V}.plan.submit.alice"]
    found += [f"{V}.logs.*.*.*.*.{name}" for name in (*NAMES, "*")]
    found += [f"{V}.attach.>", *(f"{V}.attach.*.{host}.{name}" for host in HOSTS for name in (">", "alice"))]
    found += ["$KV.corral_planner.>", f"$KV.corral_hosts.{HOSTS[0]}", "$SRV.PING", "$JS.EVENT.ADVISORY.>"]
    return found


def consuming(*streams: str) -> set[str]:
    return {
        f"$JS.API.CONSUMER.{rest}"
        for stream in streams
        for rest in (
            f"CREATE.{stream}",
            f"CREATE.{stream}.c",
            f"CREATE.{stream}.c.{V}.samples.node-7",
            f"DURABLE.CREATE.{stream}.c",
            f"INFO.{stream}.c",
            f"DELETE.{stream}.c",
            f"MSG.NEXT.{stream}.c",
        )
    }


SERVICE_QUESTIONS = {f"$SRV.{verb}{rest}" for verb in ("PING", "INFO", "STATS") for rest in ("", ".corral-planner")}
FOUR = STREAMS[:4]
STATE_OF_STREAMS = {"$JS.API.INFO", *(f"$JS.API.STREAM.INFO.{stream}" for stream in (*FOUR, *OF_JOBS))}
HEALTH = {subject for subject in publish_probes() if subject.startswith(f"{V}.health")}
UNNAMED = {
    *(f"{V}.plan.{what}" for what in (*NAMED, "explain")),
    *(f"{V}.{what}" for what in ("query", "history.snapshot", "history.read", "notify.rules", "notify.override")),
}
SEEING = {
    # What nobody's name changes, with and without one.
    *(f"{V}.plan.{what}{rest}" for what in LISTS for rest in ("", ".alice")),
    *(f"{V}.history.{what}{rest}" for what in ("cancel", "status") for rest in ("", ".alice")),
    # Answered by the address that has a name in it, and by nothing else.
    *UNNAMED,
    *SERVICE_QUESTIONS,
    *STATE_OF_STREAMS,
    *HEALTH,
    *(f"$JS.API.DIRECT.GET.CORRAL_TELEMETRY.{V}.agents.{host}" for host in HOSTS),
    "$JS.API.DIRECT.GET.CORRAL_INVENTORY",
    "$JS.API.DIRECT.GET.CORRAL_FACTS",
    "_R_.a.b",
}
SERVING = {
    *SERVICE_QUESTIONS,
    *STATE_OF_STREAMS,
    *HEALTH,
    *(f"$JS.API.STREAM.INFO.KV_{bucket}" for bucket in BUCKETS[:2]),
    *(f"$JS.API.STREAM.CREATE.{stream}" for stream in (*FOUR, *OF_JOBS, *KEPT[5:7])),
    *(f"_INBOX.{name}.x" for name in NAMES),
    "_R_.a.b",
}


def asking(name: str) -> set[str]:
    of_planner = {f"{V}.plan.{what}.{name}" for what in ("request", "renew", "release", "withdraw", "submit", "job")}
    return {*of_planner, f"{V}.notify.rules.{name}"}


def reading_logs(name: str) -> set[str]:
    """Those of this owner alone: not those of one whose name begins or ends as this one does."""
    return {f"$JS.API.DIRECT.GET.CORRAL_LOGS.{logs(host, name)}" for host in HOSTS}


def attaching(name: str, *, override: bool = False) -> set[str]:
    return {subject for host in HOSTS for subject in attached(host, name, override=override)}


def seeing(name: str) -> set[str]:
    return SEEING | {f"{V}.plan.explain.{name}", f"{V}.query.{name}"}


PUBLISH: dict[Role, set[str]] = {
    Role.COLLECTOR: {
        *(f"{V}.{kind}.node-7" for kind in TELEMETRY),
        "$KV.corral_hosts.node-7",
        "$JS.API.STREAM.INFO.KV_corral_hosts",
        "$JS.API.DIRECT.GET.KV_corral_hosts.$KV.corral_hosts.node-7",
        *(f"$JS.API.DIRECT.GET.{STREAM_OF[kind]}.{V}.{kind}.node-7" for kind in TELEMETRY),
        f"{V}.plan.leases",
        f"{V}.health.collector.node-7",
        "$JS.API.INFO",
        "_INBOX.node-7.x",
        "_R_.a.b",
    },
    Role.RUNNER: {
        f"{V}.plan.runner.node-7",
        *(subject for subject in LOGS if subject.startswith(f"{V}.logs.node-7.")),
        f"{V}.health.runner.node-7",
        "$JS.API.INFO",
        "_INBOX.runner-7.x",
        "_R_.a.b",
    },
    Role.PROCESSOR: {
        *SERVING,
        f"{V}.dead.invalid",
        f"{V}.reports.fleet",
        *(f"{V}.history.status{rest}" for rest in ("", ".alice")),
        *consuming(*STREAMS[:3], "CORRAL_PARTITIONS", "KV_corral_processors", "CORRAL_JOBS"),
        *(f"$JS.ACK.{stream}.c.1.1.1.1.1" for stream in (*STREAMS[:3], "CORRAL_PARTITIONS", "CORRAL_JOBS")),
        *(f"$JS.API.STREAM.{verb}.{name}" for verb in ("INFO", "CREATE") for name in ("CORRAL_PARTITIONS", KEPT[7])),
        "$KV.corral_processors.h.part.x",
        "$JS.API.DIRECT.GET.KV_corral_processors.$KV.corral_processors.x",
        "$JS.API.STREAM.MSG.GET.KV_corral_processors",
        # Whether the partitions still repeat the telemetry, and having them copied again.
        "$JS.API.STREAM.MSG.GET.CORRAL_TELEMETRY",
        "$JS.API.STREAM.MSG.GET.CORRAL_PARTITIONS",
        "$JS.API.STREAM.UPDATE.CORRAL_PARTITIONS",
        "$JS.FC.KV_corral_processors.c.x",
    },
    Role.PLANNER: {
        *SERVING,
        f"{V}.leases.granted.l-1",
        f"{V}.jobs.12",
        *(f"{V}.runs.{host}" for host in HOSTS),
        "$JS.API.STREAM.MSG.GET.CORRAL_JOBS",
        *(subject for subject in publish_probes() if subject.startswith(f"{V}.plan.")),
        "$KV.corral_planner.leader",
        "$KV.corral_planner.lease.l-1",
        "$JS.API.STREAM.UPDATE.KV_corral_planner",
        "$JS.API.STREAM.PURGE.KV_corral_planner",
        "$JS.API.STREAM.UPDATE.CORRAL_FACTS",
        "$JS.API.STREAM.MSG.GET.KV_corral_planner",
        "$JS.API.STREAM.MSG.GET.CORRAL_FACTS",
        *consuming(*STREAMS[:3], "KV_corral_planner"),
    },
    Role.NOTIFIER: {
        *SERVICE_QUESTIONS,
        *STATE_OF_STREAMS,
        *HEALTH,
        *(f"{V}.plan.{what}" for what in ("leases", "devices", "queue", "groups", "jobs")),
        f"{V}.query.notifier",
        *(f"{V}.history.{what}" for what in ("cancel", "cancel.alice", "ack.p.q")),
        *(f"_INBOX.{name}.x" for name in NAMES),
        "_R_.a.b",
        *(f"$KV.corral_notify.{key}" for key in ("rules.alice", "out.x")),
        *(f"$JS.API.STREAM.{verb}.{OF_NOTIFIER}" for verb in ("INFO", "CREATE", "MSG.GET")),
        "$JS.API.DIRECT.GET.KV_corral_notify.$KV.corral_notify.rules.alice",
        *consuming("CORRAL_FACTS", "CORRAL_JOBS", "CORRAL_REPORTS", OF_NOTIFIER),
    },
    Role.REQUESTER: seeing("alice") | asking("alice") | reading_logs("alice") | attaching("alice"),
    Role.VIEWER: seeing("vera"),
    Role.GATEWAY: set(),
    Role.OPERATOR: {
        *seeing("olga"),
        *asking("olga"),
        *READ_LOGS,
        *attaching("olga"),
        *attaching("olga", override=True),
        f"{V}.plan.job_override.olga",
        f"{V}.plan.drain.olga",
        f"{V}.plan.evict.olga",
        f"{V}.plan.set_groups.olga",
        f"{V}.plan.book.olga",
        f"{V}.notify.override.olga",
        f"{V}.history.snapshot.olga",
        f"{V}.history.read.olga",
    },
}
LIVE = {*(f"{V}.{kind}.*" for kind in TELEMETRY), f"{V}.samples.node-7"}
EVENTS = LIVE | {f"{V}.leases.>", f"{V}.jobs.*"}
ALL_LOGS = {*LOGS, *(f"{V}.logs.*.*.*.*.{name}" for name in (*NAMES, "*", ">"))}
SUBSCRIBE: dict[Role, set[str]] = {
    Role.COLLECTOR: {
        f"{V}.leases.>",
        f"{V}.health",
        f"{V}.health.collector",
        f"{V}.health.collector.node-7",
    },
    Role.RUNNER: {
        f"{V}.runs.node-7",
        f"{V}.health",
        f"{V}.health.runner",
        f"{V}.health.runner.node-7",
        *(f"{V}.attach.*.node-7.{name}" for name in (">", "alice")),
    },
    Role.PROCESSOR: {
        *(f"{V}.query{rest}" for rest in ("", ".*", ".alice")),
        *(f"{V}.history.{rest}" for rest in (">", "snapshot.*", "read.olga")),
        f"{V}.history.snapshot",
        f"{V}.history.ack.p.*",
        *("$SRV.>", "$SRV.PING"),
        *(s for s in subscribe_probes() if s.startswith(f"{V}.health")),
    },
    Role.PLANNER: {
        *LIVE,
        f"{V}.plan.>",
        f"{V}.plan.request.alice",
        *(f"{V}.plan.runner.*", f"{V}.plan.submit.alice"),
        *("$SRV.>", "$SRV.PING"),
        *(s for s in subscribe_probes() if s.startswith(f"{V}.health")),
    },
    Role.NOTIFIER: {
        *(f"{V}.notify.{rest}" for rest in (">", "rules", "rules.alice", "override.olga")),
        *(f"{V}.health", f"{V}.health.notifier", f"{V}.health.notifier.x"),
    },
    Role.REQUESTER: EVENTS | {f"{V}.logs.*.*.*.*.alice", *(logs(host, "alice") for host in HOSTS)},
    Role.VIEWER: EVENTS,
    Role.GATEWAY: {f"{V}.health", f"{V}.health.gateway", f"{V}.health.gateway.x"},
    Role.OPERATOR: EVENTS | {f"{V}.dead.*", *ALL_LOGS},
}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBus]:
    made = SecuredBus(tmp_path_factory.mktemp("matrix"))
    for role, name in USERS.items():
        made.add(role, name, **({"hosts": ["node-7"]} if role is Role.RUNNER else {}))
    made.add(Role.RUNNER, "runner-8", hosts=["node-8"])
    made.add(Role.REQUESTER, "bob")
    made.add(Role.ADMIN, "root-of-all")
    made.server.start()
    yield made
    made.server.kill()


@pytest.fixture
async def layout(secured: SecuredBus) -> SecuredBus:
    nc = await secured.connect("planner")
    await ensure_layout(nc.jetstream())
    await nc.close()
    return secured


class Watched:
    """Operations that the server refuses to a connection."""

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self._last = asyncio.Event()

    async def on_error(self, error: Exception) -> None:
        _, _, subject = str(error).partition(' to "')
        self.refused.add(subject.rstrip('"'))
        if LAST in subject:
            self._last.set()

    async def settled(self, nc: Client) -> None:
        """Refusals come in order, so that after this one there are no more."""
        await nc.publish(LAST)
        async with asyncio.timeout(20):
            await self._last.wait()
        self.refused.discard(LAST)


LAST = "nobody.may.publish.here"


async def tried(secured: SecuredBus, name: str, probes: list[str], verb: str) -> set[str]:
    """The probes that the server lets a user do."""
    watched = Watched()
    nc = await secured.connect(name, error_cb=watched.on_error)
    try:
        for probe in probes:
            if verb == "publish":
                await nc.publish(probe, b"")
            else:
                await nc.subscribe(probe)
        await watched.settled(nc)
    finally:
        await nc.close()
    return {probe for probe in probes if probe.lower() not in watched.refused}


@pytest.mark.parametrize("role", USERS)
async def test_a_role_may_do_what_is_written_here_and_nothing_else(layout: SecuredBus, role: Role) -> None:
    name = USERS[role]
    published = await tried(layout, name, publish_probes(), "publish")
    assert published - PUBLISH[role] == set(), "it may publish what it should not"
    assert PUBLISH[role] - published == set(), "it may not publish what it should"
    listened = await tried(layout, name, subscribe_probes(), "subscribe")
    expected = SUBSCRIBE[role] | {f"_INBOX.{name}.>"}
    assert listened - expected == set(), "it may listen to what it should not"
    assert expected - listened == set(), "it may not listen to what it should"


async def test_a_gateway_answers_its_health_checks_and_can_ask_nothing_of_its_own(layout: SecuredBus) -> None:
    gateway = await layout.connect("http")
    asker = await layout.connect("vera")

    async def answer(message: Msg) -> None:
        await message.respond(b"well")

    try:
        await gateway.subscribe(f"{V}.health.gateway", cb=answer)
        await gateway.flush()
        assert (await asker.request(f"{V}.health.gateway", b"", timeout=10)).data == b"well"
    finally:
        await gateway.close()
        await asker.close()


async def test_nobody_gets_in_without_a_key_that_is_known(layout: SecuredBus, tmp_path: Path) -> None:
    stranger = SecuredBus(tmp_path / "elsewhere")
    stranger.add(Role.ADMIN, "planner")
    with pytest.raises(BusUnavailable, match="does not take the credentials"):
        await connect(layout.server.url, credentials=stranger.credentials("planner"))
    with pytest.raises(BusUnavailable, match="wants credentials"):
        await connect(layout.server.url)


PRIZES = (
    "$KV.corral_planner.leader",
    "$KV.corral_planner.lease.l-1",
    f"{V}.plan.evict.olga",
    f"{V}.plan.drain.olga",
    f"{V}.plan.set_groups.olga",
    f"{V}.plan.book.olga",
    f"{V}.leases.evicted.l-1",
    f"{V}.samples.node-8",
    f"{V}.jobs.12",
    f"{V}.runs.node-8",
    f"{V}.plan.runner.node-8",
    f"{V}.plan.job_override.olga",
    "$KV.corral_notify.rules.bob",
    f"{V}.notify.rules.bob",
    f"{V}.notify.override.olga",
    logs("node-8", "bob"),
    "$KV.corral_hosts.node-8",
    *(f"{V}.history.{what}{whose}" for what in ("snapshot", "read") for whose in ("", ".olga", ".vera")),
    *(f"{V}.query{whose}" for whose in ("", ".bob")),
    *(f"{V}.plan.{what}" for what in ("request", "release", "evict", "drain", "set_groups", "book")),
    f"{V}.plan.explain.bob",
)


async def forge(nc: Client, subjects: set[str]) -> None:
    """Ask on every subject that may be asked on, for an answer where one may not publish."""
    for subject, prize in itertools.product(sorted(subjects), PRIZES):
        await nc.publish(subject, b'{"lease_id":"l-1","reason":"forged"}', reply=prize)
    await nc.flush(10)


@pytest.mark.parametrize("role", [Role.COLLECTOR, Role.RUNNER, *PEOPLE])
async def test_an_answer_goes_to_who_asked_and_to_nobody_else(layout: SecuredBus, role: Role) -> None:
    """A server does not check where an answer is wanted. Within one account JetStream would write it over a lease."""
    seen: list[str] = []
    came = asyncio.Event()

    async def see(message: Msg) -> None:
        seen.append(message.subject)
        came.set()

    watching = await layout.connect("root-of-all")
    asking_ = await layout.connect(USERS[role])
    try:
        for prize in PRIZES:
            await watching.subscribe(prize, cb=see)
        # What one publishes oneself is no forgery.
        await watching.flush()
        await forge(asking_, PUBLISH[role] - set(PRIZES))
        for subject in sorted(PUBLISH[role] & UNNAMED):
            await asking_.publish(subject, b'{"lease_id":"l-1"}')
        await asking_.flush()
        await asyncio.sleep(0.3)
        await watching.flush()
        assert seen == []
        # The trap works: within the account of the streams, an answer does go where it is wanted.
        planner = await layout.connect("planner")
        await planner.publish("$JS.API.INFO", b"", reply=PRIZES[0])
        await planner.flush()
        async with asyncio.timeout(5):
            await came.wait()
        await planner.close()
    finally:
        await watching.close()
        await asking_.close()


async def test_a_host_purges_no_other_hosts_entry(layout: SecuredBus) -> None:
    """A server that takes rollups lets a write to one key purge all others of the bucket."""
    node = await layout.connect("node-7")
    admin = await layout.connect("root-of-all")
    try:
        await admin.jetstream().publish("$KV.corral_hosts.node-8", b"another agent")
        for extent in ("all", "sub"):
            answer = await node.request("$KV.corral_hosts.node-7", b"mine", headers={"Nats-Rollup": extent}, timeout=5)
            assert "rollup not permitted" in json.loads(answer.data)["error"]["description"]
        answer = await node.request("$KV.corral_hosts.node-7", b"mine", timeout=5)
        assert "error" not in json.loads(answer.data)
        bucket = await admin.jetstream().key_value("corral_hosts")
        assert (await bucket.get("node-8")).value == b"another agent"
    finally:
        await node.close()
        await admin.close()


async def test_an_answer_is_read_by_who_asked_alone(layout: SecuredBus) -> None:
    """Bob can't listen to Alice's inbox, nor be mistaken for a service of hers."""
    watched = Watched()
    bob = await layout.connect("bob", error_cb=watched.on_error)
    alice = await layout.connect("alice")
    try:
        inbox = alice.new_inbox()
        await bob.subscribe(inbox)
        await bob.publish(inbox, b"forged")
        await watched.settled(bob)
        assert watched.refused == {inbox.lower()}
        answer = await alice.request("$JS.API.INFO", b"", timeout=5)
        assert b"account_info" in answer.data
    finally:
        await alice.close()
        await bob.close()


async def test_what_a_job_prints_reaches_its_owner_once_and_nobody_else(layout: SecuredBus) -> None:
    """Neither live nor stored, whatever subject one asks for: a server takes wildcards there, too."""
    found: dict[str, list[str]] = {name: [] for name in ("alice", "bob", "olga")}
    both = asyncio.Event()
    people = {name: await layout.connect(name) for name in found}
    runner = await layout.connect("runner-7")

    def see(name: str) -> Callable[[Msg], Awaitable[None]]:
        async def seen(message: Msg) -> None:
            found[name].append(message.data.decode())
            if len(found["olga"]) == 2:
                both.set()

        return seen

    try:
        for name, nc in people.items():
            await nc.subscribe(f"{V}.logs.*.*.*.*.{'>' if name == 'olga' else name}", cb=see(name))
            await nc.flush()
        for owner in ("alice", "bob"):
            await runner.jetstream().publish(logs("node-7", owner), f"of {owner}".encode())
        async with asyncio.timeout(10):
            await both.wait()
        for nc in people.values():
            await nc.flush()
        assert found == {"alice": ["of alice"], "bob": ["of bob"], "olga": ["of alice", "of bob"]}
        stored = "$JS.API.DIRECT.GET.CORRAL_LOGS."
        answer = await people["alice"].request(stored + logs("node-7", "alice"), timeout=5)
        assert answer.data == b"of alice"
        for subject in (f"{V}.logs.>.12.0.h0.alice", f"{V}.logs.node-7.12.0.>.alice", f"{V}.logs.*.*.*.*.alice"):
            answer = await people["alice"].request(stored + subject, timeout=5)
            assert b"bob" not in answer.data
    finally:
        for nc in (*people.values(), runner):
            await nc.close()


async def test_orders_need_a_token(layout: SecuredBus) -> None:
    """Within an account an answer goes wherever the one who asks wants it: to the subject of another's orders, too."""
    came: asyncio.Queue[bytes] = asyncio.Queue()
    runner = await layout.connect("runner-8")
    node = await layout.connect("node-7")

    async def see(message: Msg) -> None:
        came.put_nowait(message.data)

    try:
        await runner.subscribe(f"{V}.runs.node-8", cb=see)
        await runner.flush()
        forged = codec.encode(RunOrders(planner="p", term=99, complete=True))
        await node.jetstream().publish(f"{V}.events.node-7", forged)
        stored = f"$JS.API.DIRECT.GET.CORRAL_FACTS.{V}.events.node-7"
        await node.publish(stored, b"", reply=f"{V}.runs.node-8")
        await node.flush()
        async with asyncio.timeout(5):
            assert await came.get() == forged
    finally:
        await runner.close()
        await node.close()


async def test_sessions_are_asked_for_by_people_alone(layout: SecuredBus) -> None:
    """An answer that is wanted where a runner listens has no reply subject, and none of a person's gets there."""
    came: asyncio.Queue[Msg] = asyncio.Queue()
    runner, node, processor, alice, bob = [
        await layout.connect(name) for name in ("runner-8", "node-7", "processor", "alice", "bob")
    ]

    async def see(message: Msg) -> None:
        came.put_nowait(message)

    async def answer(message: Msg) -> None:
        # An answer in parts wants acknowledgements, and so has a reply subject.
        await processor.publish(message.reply, b"forged", reply=f"{V}.history.ack.p.q")

    aim = f"{V}.attach.open.node-8.alice"
    try:
        await runner.subscribe(f"{V}.attach.*.node-8.>", cb=see)
        await processor.subscribe(f"{V}.query.*", cb=answer)
        await runner.flush()
        await processor.flush()
        assert (await bob.request(f"{V}.query.bob", b"", timeout=5)).data == b"forged"
        await bob.publish(f"{V}.query.bob", b"", reply=aim)
        await node.jetstream().publish(f"{V}.events.node-7", b"forged")
        await node.publish(f"$JS.API.DIRECT.GET.CORRAL_FACTS.{V}.events.node-7", b"", reply=aim)
        async with asyncio.timeout(5):
            forged = await came.get()
        assert (forged.subject, forged.data, forged.reply) == (aim, b"forged", "")
        await alice.publish(aim, b"mine", reply=alice.new_inbox())
        async with asyncio.timeout(5):
            mine = await came.get()
        assert (mine.subject, mine.data, mine.reply.startswith("_R_.")) == (aim, b"mine", True)
        assert came.empty()
    finally:
        for nc in (runner, node, processor, alice, bob):
            await nc.close()
