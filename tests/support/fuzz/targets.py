"""What is fuzzed: everything that reads what somebody else has written.

A target takes bytes and returns; whatever else than a documented refusal comes out of it is a fault. `TARGETS` is used
by the short form in the suite (`test_fuzz_short.py`) and by the long one (`make fuzz`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
from corral.bus.access.folder import make_key
from corral.bus.access.tokens import TokenError, identity_of_token, token_of
from corral.bus.credentials import Identity
from corral.cli import config
from corral.cli.exits import CommandError
from corral.cli.loading import load
from corral.cli.operate.groups import file as group_file
from corral.cli.work.jobs.directives import read_directives
from corral.client.errors import CorralError
from corral.client.model_files import read_model
from corral.client.model_files.numbers import InvalidModelFile
from corral.client.query import QueryResult
from corral.collectors.agent.spill import Record, Spill
from corral.collectors.replay.source import ReplaySource
from corral.collectors.source import EndOfData
from corral.exporter.families import FAMILIES
from corral.exporter.live import LiveFleet
from corral.exporter.page import write
from corral.gateway.guard import hostname
from corral.gateway.routes import message_of as message_of_parameters
from corral.gateway.waiting import wait_seconds
from corral.notifier.messages import message_of
from corral.notifier.news import of_lease_event
from corral.notifier.quiet import parse_quiet, quiet_until
from corral.notifier.rule_text import parse_rules
from corral.notifier.rules import WrongRule
from corral.planner.api.request_context import RequestContext
from corral.planner.broker.quotas.groups import beyond, changed
from corral.planner.fleet import summary
from corral.planner.fleet.fleet import Fleet, apply
from corral.planner.leases.lifecycle import Refused
from corral.planner.placement.decide import InvalidRequest, Policies, decide, explain
from corral.planner.simulation.jobs import read_jobs
from corral.planner.simulation.sacct import read_sacct
from corral.planner.simulation.trace import TraceError, read_arrivals, read_nodes
from corral.processors.ingest import facts
from corral.processors.ingest.columnar import SCHEMA, Decoder, Incoming
from corral.processors.ingest.deduplication import Arrivals
from corral.processors.query.guard.errors import QueryError
from corral.processors.query.guard.guard import SqlGuard
from corral.processors.storage import Database
from corral.processors.storage.protocol import Series
from corral.schemas import codec, columns, operations, requests, subjects, telemetry
from corral.schemas.health import ServiceHealth
from corral.schemas.instruments import ServiceKind
from corral.schemas.models.sizes import sizes
from corral.schemas.query import QueryEnd, ResultFormat
from corral.schemas.values import globs
from corral.schemas.values.units import parse_bytes, parse_seconds
from corral.schemas.work import groups
from corral.schemas.work.jobs import JobFilter
from support.fuzz import seeds


class Target(NamedTuple):
    """Something to fuzz.

    Attributes:
        run: reads the bytes.
        seeds: real inputs.
    """

    run: Callable[[bytes], None]
    seeds: list[bytes]


TARGETS: dict[str, Target] = {}


def target(found: list[bytes]) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    def add(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[run.__name__] = Target(run, found)
        return run

    return add


_MESSAGES: list[tuple[type[Any], Any]] = [
    *seeds.TELEMETRY.values(),
    *seeds.ASKED,
    *seeds.ANSWERS,
    (ServiceHealth, ServiceHealth(service=ServiceKind.PLANNER, instance="a", host="b", ready=True)),
]
_FORMS = (codec.JSON, codec.MSGPACK)


@target(seeds.both(_MESSAGES))
def messages(data: bytes) -> None:
    """Every message of the contract, in both forms: refused, or the same after a way there and back."""
    if not data:
        return
    type, _ = _MESSAGES[(data[0] // 2) % len(_MESSAGES)]
    form = _FORMS[data[0] % 2]
    try:
        found = codec.decode(data[1:], type, form)
    except codec.DecodeError as error:
        assert error.code in ("invalid", "undecodable")
        return
    again = codec.encode(found, form)
    assert _same(codec.decode(again, type, form), found)


def _same(a: object, b: object) -> bool:
    """Equal, where NaN is itself."""
    return msgspec.msgpack.encode(a) == msgspec.msgpack.encode(b)


# What the planner is asked


@functools.cache
def _fleet() -> Fleet:
    fleet = Fleet()
    now = time.time()
    for host in ("h1", "h2"):
        apply(fleet, seeds.inventory(host), now)
        apply(fleet, seeds.samples(host), now)
    lease = seeds.lease()
    apply(fleet, requests.LeaseEvent(kind=requests.LeaseEventKind.GRANTED, time=lease.granted_at, lease=lease), now)
    return fleet


_POLICIES = Policies()
_OWNERS = (None, "alice", "bob.x")


@target(seeds.both(seeds.ASKED))
def questions(data: bytes) -> None:
    """Requests as they come over the bus: refused with the field, or decided on."""
    if not data:
        return
    type, _ = seeds.ASKED[(data[0] // 2) % len(seeds.ASKED)]
    form = _FORMS[data[0] % 2]
    request: Any = SimpleNamespace(headers={codec.CONTENT_TYPE_HEADER: form}, data=data[1:])
    owner = _OWNERS[data[0] // 64 % 3] if type in (requests.WorkRequest, requests.LeaseAction) else None
    asked = RequestContext(request, owner, 2**20, lambda *_: None)
    try:
        body = asked.decode(type)
    except codec.DecodeError as error:
        assert error.code in ("invalid", "undecodable", "too_large", "refused")
        return
    assert len(asked.warnings) <= 16
    fleet, now = _fleet(), time.time()
    try:
        if isinstance(body, requests.WorkRequest):
            decision = decide(fleet, body, now, _POLICIES, learn=False)
            codec.encode(decision, codec.JSON) if isinstance(decision, requests.Rejection) else decision.grants
        elif isinstance(body, operations.ExplainRequest) and sum(more.devices for more in body.with_more) < 1000:
            codec.encode(explain(fleet, body.request, now, _POLICIES, body.with_more), codec.JSON)
        elif isinstance(body, operations.DeviceFilter):
            codec.encode(operations.Devices(devices=summary.devices(fleet, now, body)), codec.JSON)
            codec.encode(summary.summary(fleet, now, body), codec.JSON)
        elif isinstance(body, groups.GroupChange):
            beyond(changed(groups.GroupTree(), body).config, fleet)
    except Refused as refused:
        assert (refused.error.code, refused.error.field[:1]) == ("invalid", "$")
    except InvalidRequest as error:
        assert error.field.startswith("$")


@target([b"\x00*H100*\x00[A-C]?\x00NVIDIA H100 80GB HBM3", b"\x01**a*a*a*a*a*a*b\x00aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"])
def patterns(data: bytes) -> None:
    """Patterns over names of hosts and models: no pattern takes a time that its length does not explain."""
    found = data.decode(errors="replace").split("\0")[:8]
    try:
        globs.check(found, "$.hosts")
    except codec.DecodeError:
        return
    if len(found) > 1 and len(found[0]) < 40:  # the standard library's is slow, but right
        assert globs.matches(found[1], found[0]) == fnmatchcase(found[1], found[0])
    only = operations.DeviceFilter(hosts=found[:1], models=found[1:3], devices=found[3:])
    summary.devices(_fleet(), time.time(), only)
    request = requests.WorkRequest(owner="alice", models=found[:2], hosts=found[2:])
    decide(_fleet(), request, time.time(), _POLICIES, learn=False)


# Telemetry


_SUBJECTS = list(seeds.TELEMETRY)


def _telemetry_seeds() -> list[bytes]:
    return [
        bytes([at]) + codec.encode(message, codec.JSON if "leases" in subject else codec.MSGPACK)
        for at, (subject, (_, message)) in enumerate(seeds.TELEMETRY.items())
    ]


@target([*_telemetry_seeds(), b"\x00" + codec.encode(seeds.samples())])
def ingest(data: bytes) -> None:
    """Messages of telemetry to rows: each is stored, refused or a duplicate, and what is stored fits its columns."""
    if not data:
        return
    subject = _SUBJECTS[data[0] % len(_SUBJECTS)]
    message = Incoming(subject, data[1:], 5)
    good = Incoming("corral.v1.samples.h1", _GOOD, 6)
    now_ns = time.time_ns()
    arrivals = Arrivals()
    if subject.startswith(subjects.SAMPLES):
        series = Series()
        decoder = Decoder(series)
        table, accepted, refused = decoder.decode([message, good], arrivals.is_new, now_ns)
        assert good in accepted or decoder.duplicates
        assert len(accepted) + len(refused) + decoder.duplicates == 2
        if table is not None:
            assert table.schema == SCHEMA
            table.validate(full=True)
            assert table.num_rows <= len(data) // 8 + 8
        together = Decoder(series, few=1)
        together.decode([good], lambda *_: True, now_ns)
        other, *found = together.decode([message, good], Arrivals().is_new, now_ns)
        assert found == [accepted, refused]
        assert _rows(other) == _rows(table)
    else:
        found = facts.decode([message], arrivals.is_new, now_ns)
        assert len(found.accepted) + len(found.refused) + found.duplicates == 1
        for name, table in found.tables().items():
            assert table.schema == facts.TABLES[name].schema
            table.validate(full=True)
    for run in arrivals.take_changed():
        assert 0 <= run.high < 2**64
        assert 0 <= run.seen < 2**64


def _rows(table: pa.Table | None) -> list[str]:
    return [] if table is None else sorted(map(str, table.to_pylist()))


_GOOD = codec.encode(msgspec.structs.replace(seeds.small_samples(), agent="good", sequence=1))


@target([msgspec.msgpack.encode([[0, 4, "x", 1.5], [7, -1]])])
def arrays(data: bytes) -> None:
    """Batches of samples whose arrays are of any length and content, by the reader that clients and planners use."""
    if len(data) < 4:
        return
    devices, ticks, cut, kind = data[0] % 9, data[1] % 9, data[2], data[3]
    rest = data[4:]
    count = devices * ticks
    metric = list(columns.METRICS)[kind % len(columns.METRICS)]
    size = int(columns.METRICS[metric].row.unit.dtype[-1])
    filled = (rest * (1 + count * 8 // max(1, len(rest))))[: count * size]
    batch = telemetry.SampleBatch(
        host="h1",
        agent="x",
        sequence=cut,
        source="nvml",
        devices=[f"d{at if cut != 7 else 0}" for at in range(devices)],
        times_ns=(rest * count)[: max(0, count * 8 - (cut == 1))],
        columns={metric: filled[: len(filled) - (cut == 2)]},
        nulls={metric: bytes(at % 2 for at in range(count + (cut == 3)))} if kind % 2 else {},
    )
    try:
        columns.check(batch)
    except codec.DecodeError as error:
        assert error.field.startswith("$.")
    else:
        assert len(list(columns.rows(batch))) == count
    table, accepted, refused = Decoder(Series()).decode(
        [Incoming("corral.v1.samples.h1", codec.encode(batch), 1)], Arrivals().is_new, time.time_ns()
    )
    assert len(accepted) + len(refused) == 1
    if table is not None:
        table.validate(full=True)


_FOLDED = (telemetry.SampleBatch, telemetry.ProcessBatch, telemetry.Inventory, telemetry.DeviceEvent)


@target(
    [
        bytes([at]) + codec.encode(message)
        for at, (type, message) in enumerate((t, m) for t, m in seeds.TELEMETRY.values() if t in _FOLDED)
    ]
)
def fold(data: bytes) -> None:
    """A planner's view of the fleet: whatever one host says, the others can be asked for afterwards."""
    if not data:
        return
    fleet = Fleet()
    now = time.time()
    apply(fleet, seeds.inventory("h2"), now)
    apply(fleet, seeds.samples("h2"), now)
    apply(fleet, seeds.inventory("h1"), now)
    for at, piece in enumerate(data[1:].split(b"\0\xff\0")[:4]):
        type = _FOLDED[(data[0] + at) % 4]
        try:
            message = codec.decode(piece, type)
            host = message.host.name if isinstance(message, telemetry.Inventory) else message.host
            if host == "h1":
                apply(fleet, message, now + at)
        except (codec.DecodeError, ValueError):
            continue
    found = decide(fleet, requests.WorkRequest(owner="alice", hosts=["h2"]), now + 1, _POLICIES, learn=False)
    assert not isinstance(found, requests.Rejection), found
    codec.encode(operations.Devices(devices=summary.devices(fleet, now + 5)), codec.JSON)
    codec.encode(summary.summary(fleet, now + 5), codec.JSON)


@target(_telemetry_seeds())
def scrape(data: bytes) -> None:
    """The exporter's page, whatever was published."""
    if not data:
        return
    live = LiveFleet(_NC)
    kinds = (live.take_samples, live.take_inventory, live.take_event, live.take_report)
    live.take_inventory("corral.v1.inventory.h1", _INVENTORY)
    live.take_samples("corral.v1.samples.h1", _GOOD)
    live.take_samples("corral.v1.samples.h2", _GOOD)
    kinds[data[0] % 4]("corral.v1.x.h1", data[1:])
    page = b"".join(write(live.hosts(), list(FAMILIES.values())))
    for line in page.splitlines():
        assert line.startswith(b"#") or b" " in line


_NC: Any = SimpleNamespace(is_closed=True)
_INVENTORY = codec.encode(seeds.inventory())


# SQL


@functools.cache
def _guard() -> SqlGuard:
    folder = Path(tempfile.mkdtemp(prefix="corral-fuzz-"))
    storage = Database(folder / "history.duckdb", memory_bytes=256 * 2**20)
    return SqlGuard(storage.cursor)


@target([sql.encode() for sql in seeds.SQL])
def sql(data: bytes) -> None:
    """The guard of the history: a statement is refused, or passes as it is."""
    text = data.decode(errors="replace")
    try:
        statement = _guard().check(text, 10)
    except QueryError as error:
        assert error.code in ("invalid", "refused")
        return
    assert statement.sql


# Small texts


@target([b"20GiB", b"1.5TB", b"512", b"1h30m", b"250ms", b"1 h 30 m", b"9" * 400 + b"TiB", b"1s" * 99])
def units(data: bytes) -> None:
    """Amounts and durations that people write."""
    text = data.decode(errors="replace")
    for parse in (parse_bytes, parse_seconds):
        try:
            value = parse(text)
        except ValueError:
            continue
        assert math.isfinite(value)
        assert value >= 0


@target(
    [
        b"#!/bin/sh\n#SBATCH --gres=gpu:a100:2 -N2 -n 8\n#SBATCH --mem=4G --time=1-2:03:04 -d afterok:1:2,afterany:3\n",
        b"#!/bin/sh\n#CORRAL --gpus 2 --name 'a b' # c\n#SBATCH --array=0-9%3 --output=%A_%a.out\nsrun $SLURM_PROCID\n",
    ]
)
def scripts(data: bytes) -> None:
    """Options in scripts, of Corral and of Slurm."""
    text = data.decode(errors="replace")
    lines = len(text.splitlines())
    try:
        found = read_directives(text)
    except ValueError as error:
        if not str(error).startswith("line "):
            raise
        return
    assert all(1 <= one.line <= lines for one in (*found.options, *found.notes, *found.unknown))


@target([b"node-7.example.org", b"*", b"a b>c"])
def names(data: bytes) -> None:
    """Whatever a host is called, its subject is one token without wildcards."""
    text = data.decode(errors="replace")
    try:
        token = subjects.host_token(text)
    except ValueError:
        return
    assert 0 < len(token) <= 128
    assert subjects.host_token(token) == token
    assert not set(token) & set(".*> \t\r\n")
    with contextlib.suppress(codec.DecodeError):
        assert codec.content_type({codec.CONTENT_TYPE_HEADER: text}) in _FORMS


_TOKEN = token_of(Identity(user="alice", role="requester", owner="team.a", seed=make_key()[0]))


@target([b"owner=team.a&states=released&limit=5", b"job_ids=12&indexes=3&active=true", _TOKEN.encode(), b"wait=30"])
def http(data: bytes) -> None:
    """Parameters of a URL become a message or a refusal; a token is one whose names can stand in a subject."""
    for type in (operations.LeaseFilter, JobFilter, operations.DeviceFilter):
        with contextlib.suppress(codec.DecodeError):
            codec.decode_request(message_of_parameters(data, type), type)
    text = data.decode("latin-1")
    hostname(text)
    wait_seconds(text)
    with contextlib.suppress(TokenError):
        identity = identity_of_token(text)
        assert not set(identity.user + identity.owner.removeprefix("*")) & set("*> \t\r\n")
        assert ".." not in identity.owner
        assert len(identity.seed) == 58


# Files


_FOLDER = Path(tempfile.mkdtemp(prefix="corral-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))


def _spilled() -> bytes:
    folder = Path(tempfile.mkdtemp(dir=_FOLDER))
    spill = Spill(folder)
    spill.append([Record(f"corral.v1.samples.h{at}", f"a1-{at}", 8, b"payload" * at) for at in range(4)])
    spill.close()
    return (folder / "00000001.spill").read_bytes()


@target([_spilled(), _spilled()[:-3]])
def spill(data: bytes) -> None:
    """The spill file of a collector: what is whole is read, what is not is left, and it goes on."""
    folder = _FOLDER / "spill"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.spill"):
        path.unlink()
    (folder / "00000001.spill").write_bytes(data)
    made = Spill(folder)
    try:
        found = 0
        while part := made.read(2**20):
            found += len(part)
            for number, _ in part:
                made.done(number)
        assert found * 8 <= len(data)
        assert made.unread == 0
        made.append([Record("s", "b-1", 0, b"later")])
        assert [record.message_id for _, record in made.read(2**20)] == ["b-1"]
    finally:
        made.close()


_CSV = b"time,uuid,gpu_util,memory_used_bytes,host\n1700000000,GPU-1,50,1000,n1\n1700000001,GPU-1,60,2000,n1\n"


@target([_CSV, _CSV.replace(b"1700000001", b"2023-11-14 22:13:21"), _CSV.replace(b"50", b"NaN")])
def recording(data: bytes) -> None:
    """A recording as CSV: refused with what to do, or replayed to its end."""
    _replayed(_FOLDER / "recording.csv", data)


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"time": [1_700_000_000, 1_700_000_001], "uuid": ["a", "b"], "gpu_util": [1.0, None]})
    pa.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@target([_parquet()])
def parquet(data: bytes) -> None:
    """The same as Parquet."""
    _replayed(_FOLDER / "recording.parquet", data)


def _replayed(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    clock = [1_700_000_000_000_000_000]
    try:
        source = ReplaySource(path, clock_ns=lambda: clock[0], speed=1e6)
    except ValueError:
        return
    source.open(lambda _: None)
    source.inventory()
    for _ in range(3):
        clock[0] += 10**15
        try:
            for tick in source.read():
                assert tick.host
        except EndOfData:
            return


@target(
    [
        b"sn,cpu_milli,memory_mib,gpu,model\nn1,64000,262144,2,T4\n",
        b"name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\np,1,2,1,500,T4|P100\n",
        b"name,submit_seconds,duration_seconds,num_gpu,priority,preemptible,expected_seconds\nj,0,60.5,8,1,true,9\n",
        b"JobID|JobName|Submit|Elapsed|AllocTRES\n7|a|2026-11-01T00:00:10|1-02:03:04|cpu=8,gres/gpu:a100=4,mem=64G\n",
    ]
)
def trace(data: bytes) -> None:
    """Tables for the simulation."""
    path = _FOLDER / "trace.csv"
    path.write_bytes(data)
    for read in (read_nodes, read_arrivals, read_jobs, read_sacct):
        try:
            read(path)
        except TraceError:
            continue


_TOML = b"""nats = "nats://gpu-bus:4222"
[collect]
interval = "100ms"
label = { rack = "r1" }
hosts = 4
[contexts.lab]
nats = "nats://lab:4222"
owner = "alice"
"""


@target([_TOML, _TOML.replace(b"interval", b"intervall"), _TOML.replace(b"4", b"[4]")])
def settings(data: bytes) -> None:
    """The configuration file: what is wrong with it is said with its place."""
    path = _FOLDER / "corral.toml"
    path.write_bytes(data)
    try:
        found = config.read([path])
        for name in ("collect", "process", "plan"):
            config.defaults(found, name, load(name))
    except CommandError as error:
        assert str(error)


_GROUPS = b"""half_life = "7d"
[prices]
H100 = 4
[groups.lab]
guarantee = { H100 = 16, "*" = 8 }
[groups."lab/vision"]
guarantee = { H100 = 8, cpus = 64, host_memory = "2TiB" }
limit = { H100 = 12.5 }
weight = 2
members = ["ann", "ben"]
"""


@target([_GROUPS, _GROUPS.replace(b"weight", b"waight"), _GROUPS.replace(b"8", b"99"), b"[groups.lab.vision]"])
def group_files(data: bytes) -> None:
    """A file of groups: what is wrong is said, and what is right is written back the same."""
    try:
        tree = group_file.parse_file(data.decode(errors="replace"))
    except group_file.GroupTextError as error:
        assert str(error)
        return
    again = group_file.parse_file(group_file.format_file(tree))
    assert [group.name for group in again.groups] == [group.name for group in tree.groups]
    assert group_file.parse_file(group_file.format_file(again)) == again
    try:
        changed(groups.GroupTree(), groups.GroupChange(replace=tree))
    except Refused as refused:
        assert refused.error.field.startswith("$.replace")


_RULES = (
    b'[[rule]]\non = ["preempted", "queue-long"]\nto = "ops"\nowner = "a*"\nquiet = ["Fri-Mon 22:00-07:00", '
    b'"00:00-24:00 Asia/Kathmandu"]\nqueue_wait = "1h30m"\nshare_excess = "25%"\nidle_for = 7200\n'
)
_NIGHT = datetime(2026, 10, 24, 23, 59, 59, tzinfo=UTC)


@target([_RULES, _RULES.replace(b"owner", b"ownr"), _RULES.replace(b"22:00", b"22:99"), b"[rule]\non = 1"])
def notify_rules(data: bytes) -> None:
    """A file of rules for notifications: what is wrong is said, and quiet times end."""
    try:
        rules = parse_rules(data.decode(errors="replace"))
    except WrongRule as error:
        assert str(error)
        return
    for rule in rules:
        times = [parse_quiet(text, rule.zone) for text in rule.quiet]
        until = quiet_until(times, _NIGHT)
        assert until is None or until > _NIGHT


@target([b"train", b"<!channel> @everyone `x`", "\u202ea\nb".encode()])
def notify_names(data: bytes) -> None:
    """Names of workloads in messages: one line, and nothing but a name."""
    name = data.decode(errors="replace")
    lease = msgspec.structs.replace(seeds.lease(), name=name)
    news = of_lease_event(requests.LeaseEvent(kind=requests.LeaseEventKind.EVICTED, time=lease.granted_at, lease=lease))
    assert news is not None
    message = message_of(news, "UTC")
    assert not set("<>\n\r\0") & set(message.title)
    assert not any(set("<>`\n\r\0") & set(value) for _, value in message.facts)


_CONFIG = (
    b'{"architectures": ["MixtralForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, '
    b'"num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100, "num_local_experts": 4, '
    b'"num_experts_per_tok": 2, "torch_dtype": "float16", "quantization_config": {"quant_method": "awq", "bits": 4}}'
)
_HEADER = (
    b'{"model.layers.0.w": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}, '
    b'"model.layers.1.w": {"dtype": "F16", "shape": [2], "data_offsets": [4, 8]}}'
)


@target([b"c" + _CONFIG, b"c" + _CONFIG.replace(b"64", b"-64"), b"s" + len(_HEADER).to_bytes(8, "little") + _HEADER])
def model_files(data: bytes) -> None:
    """A configuration, or a safetensors header beside one: refused in words, or a model whose sizes can be computed."""
    with tempfile.TemporaryDirectory() as folder:
        config = data[1:] if data[:1] == b"c" else _CONFIG
        Path(folder, "config.json").write_bytes(config)
        if data[:1] == b"s":
            Path(folder, "model.safetensors").write_bytes(data[1:])
        try:
            model = read_model(folder)
        except InvalidModelFile as error:
            assert str(error)
            return
        assert sizes(model).total >= 0


# Answers


def _arrow() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"a": [1, 2, None], "b": ["x", "y", "z"]})
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


_RESULT = (
    b'{"type":"result","columns":["a","b"],"types":["INTEGER","VARCHAR"],"rows":[[1,"x"],[2,null]],"truncated":false}'
)


@target([b"\x00" + _RESULT, b"\x01" + _arrow()])
def results(data: bytes) -> None:
    """A result as a client reads it."""
    if not data:
        return
    form = (ResultFormat.JSON, ResultFormat.ARROW)[data[0] % 2]
    with contextlib.suppress(CorralError):
        found = QueryResult(data[1:], form, QueryEnd())
        repr(found)
        list(found)
