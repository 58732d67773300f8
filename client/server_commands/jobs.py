"""Jobs that start the commands of a plan: one for each copy of the model, over all hosts of that copy.

A job starts on all its hosts or on none, and is ended on all if a command ends on one of them. Its script has the
commands of each host by its rank. Addresses and ports between the hosts are those of the attempt, from the variables
that runners set.
"""

from __future__ import annotations

import re
import shlex
from typing import Final

import msgspec
from msgspec import Struct

from ...schemas.models.serving import ServePlan, ServeStage, ServeWork
from ..errors import InvalidRequest
from .command import FIRST_PORT, HostCommand, Offer, Task, copies, devices_of
from .llama_cpp import OLD_RPC_SERVER, RPC_SERVER
from .offers import SERVERS

STARTED: Final = ("vllm", "llama.cpp", "exo")
"""Servers that jobs start; accelerate serves no requests."""
LABEL: Final = "corral.serve"
"""Label of such jobs and their leases; its value is the server."""
_MARK: Final = "# serves: "
_ADDRESS: Final = re.compile(r"@address(\d+)@")
_PORT: Final = re.compile(r"@port(\d+)@")
_NEED_SECONDS: Final = 300
"""Time in which the processes of the other hosts accept connections."""


class ServedCopy(Struct, frozen=True, kw_only=True):
    """Model that the job of one copy serves; its script has it, for those who look at the rates that it has measured.

    Attributes:
        server: that is started.
        work: the model with what it has to hold, of which this copy takes its part.
        stages: of this copy, in order.
    """

    server: str
    work: ServeWork
    stages: list[ServeStage]


class ServeJob(Struct, frozen=True, kw_only=True):
    """A job that serves one copy of a model.

    Attributes:
        name: of the job.
        script: what each of its hosts executes.
        devices: uuids, in the order of the plan.
        hosts: in the order of their ranks.
        port: HTTP port on `serving_host`; null where requests go elsewhere.
        serving_host: host that takes the requests.
        labels: of the job.
    """

    name: str
    script: str
    devices: list[str]
    hosts: list[str]
    port: int | None
    serving_host: str
    labels: dict[str, str]


def serve_jobs(
    server: str, plan: ServePlan, work: ServeWork, path: str, *, port: int = FIRST_PORT, listen: str = ""
) -> list[ServeJob]:
    """Jobs that start a server as a plan says, one for each copy of the model.

    Args:
        server: one of `STARTED`.
        plan: the plan.
        work: what it serves.
        path: path or name of the model on the hosts.
        port: HTTP port of the first copy.
        listen: address at which servers listen for requests; empty for their default.

    Raises:
        InvalidRequest: the server can't express the plan, or serves no requests.
    """
    if server not in STARTED:
        raise InvalidRequest(f"{server} serves no requests: run its command yourself", "invalid")
    chains = copies(plan) or []
    ranks = [list(dict.fromkeys(device.host for device in devices_of(stages))) for stages in chains]
    made = SERVERS[server](Task(plan, work, path, {}, port, listen))
    if made.refusal:
        raise InvalidRequest(f"{server} can't express the plan: {made.refusal}", "invalid")
    jobs: list[ServeJob] = []
    for number, (stages, hosts) in enumerate(zip(chains, ranks, strict=True)):
        addresses = {host: f"@address{rank}@" for rank, host in enumerate(hosts)}
        inner = "@port{}@".format if len(hosts) > 1 else None
        offered = SERVERS[server](Task(plan, work, path, addresses, port, listen, inner))
        commands = [command for command in offered.commands if command.copy == number]
        serving = next((command for command in commands if command.port is not None), commands[-1])
        name = work.model.name or path.rstrip("/").rpartition("/")[2] or "model"
        jobs.append(
            ServeJob(
                name=name[:200] if len(chains) == 1 else f"{name[:200]}-{number}",
                script=_script(offered, commands, hosts, ServedCopy(server=server, work=work, stages=stages)),
                devices=[device.device for device in devices_of(stages)],
                hosts=hosts,
                port=serving.port,
                serving_host=serving.host,
                labels={LABEL: server},
            )
        )
    return jobs


def served_copy(script: str) -> ServedCopy | None:
    """Model that a script of `serve_jobs` serves; None for another script."""
    line = next((line for line in script.splitlines()[:3] if line.startswith(_MARK)), None)
    try:
        return None if line is None else msgspec.json.decode(line.removeprefix(_MARK), type=ServedCopy)
    except msgspec.MsgspecError:
        return None


def _script(offered: Offer, commands: list[HostCommand], hosts: list[str], copy: ServedCopy) -> str:
    """Script with the commands of each host."""
    lines = [
        "#!/bin/bash",
        f"# written by corral serve for {offered.server} {offered.version}",
        _MARK + msgspec.json.encode(copy).decode(),
        'address() { printf %s "$CORRAL_ADDRESSES" | cut -d , -f $(($1 + 1)); }',
        "port() { echo $((MASTER_PORT + $1)); }",
    ]
    if any(command.needs for command in commands):
        lines += [
            "until_open() {",
            f"  for ((tries = 0; tries < {_NEED_SECONDS}; tries++)); do",
            '    timeout 5 bash -c "exec 3<>/dev/tcp/$1/$2" 2>/dev/null && return',
            "    sleep 1",
            "  done",
            f'  echo "corral serve: $1:$2 accepts no connections after {_NEED_SECONDS} s" >&2; exit 1',
            "}",
        ]
    if any(command.arguments[0] == RPC_SERVER for command in commands):
        lines += [
            f'command -v {RPC_SERVER} >/dev/null || {RPC_SERVER}() {{ exec {OLD_RPC_SERVER} "$@"; }}',
        ]
    lines.append('case "${NODE_RANK:-0}" in')
    for rank, host in enumerate(hosts):
        lines.append(f"{rank})")
        for command in commands:
            if command.host == host:
                lines += [f"  until_open {' '.join(_word(need).rsplit(':', 1))}" for need in command.needs]
                lines.append(f"  {_line(command)} &")
        lines.append("  ;;")
    lines += [
        "esac",
        "wait -n",
        "code=$?",
        # The processes of the other hosts would wait for it for ever.
        'echo "corral serve: a process on $(hostname) has ended with exit code $code" >&2',
        "exit $((code ? code : 1))",
    ]
    return "\n".join(lines) + "\n"


def _line(command: HostCommand) -> str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
    return " ".join([*variables, *map(_word, command.arguments)])


def _word(word: str) -> str:
    """A word for the shell; addresses and ports between the hosts are looked up when it starts."""
    quoted = shlex.quote(word)
    return _PORT.sub(r'"$(port \1)"', _ADDRESS.sub(r'"$(address \1)"', quoted))
