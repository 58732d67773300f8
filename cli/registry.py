"""List of the commands: name, module, help panel and summary of each."""

from __future__ import annotations

from typing import Final, NamedTuple


class Entry(NamedTuple):
    """A command in the list.

    Attributes:
        place: module within `corral.cli` and attribute in it, separated by a colon.
        panel: help panel that lists the command.
        summary: one line for the list of commands.
        passes_arguments: true if the arguments are a command of the user's, whose options aren't parsed.
    """

    place: str
    panel: str
    summary: str
    passes_arguments: bool = False


_TRY: Final = "Try it"
_WORK: Final = "Work on GPUs"
_LOOK: Final = "See the fleet"
_OPERATE: Final = "Operate"
_PARTS: Final = "Run the parts"
COMMANDS: Final[dict[str, Entry]] = {
    "up": Entry("local.up:up", _TRY, "Start a whole cluster on this machine: bus, collector, processor, planner."),
    "demo": Entry("local.demo:demo", _TRY, "See it all happen once, in under a minute."),
    "run": Entry("work.run:run", _WORK, "Run a command on GPUs: request, wait, run, renew, release.", True),
    "shell": Entry("work.run:shell", _WORK, "Open a shell that holds GPUs."),
    "request": Entry("work.commands:request", _WORK, "Request GPUs; print the assignment or the reasons why not."),
    "renew": Entry("work.commands:renew", _WORK, "Keep a lease for longer."),
    "release": Entry("work.commands:release", _WORK, "Give leases back."),
    "leases": Entry("work.commands:leases", _WORK, "List leases."),
    "explain": Entry("work.commands:explain", _WORK, "What would become of a request, device by device."),
    "queue": Entry("work.commands:queue", _WORK, "List the requests that wait."),
    "withdraw": Entry("work.commands:withdraw", _WORK, "Take requests back that wait."),
    "top": Entry("top.command:top", _LOOK, "The fleet, live."),
    "dashboard": Entry(
        "services.dashboard:dashboard", _LOOK, "The fleet in a browser: heat map, timelines, leases, SQL."
    ),
    "devices": Entry("operate.fleet:devices", _LOOK, "List devices with their load, free memory and leases."),
    "ps": Entry("operate.ps:ps", _LOOK, "List the processes on GPUs, with their leases."),
    "fleet": Entry("operate.fleet:fleet", _LOOK, "The fleet in numbers."),
    "query": Entry("operate.query:query", _LOOK, "Ask the history a question in SQL."),
    "watch": Entry("operate.fleet:watch", _LOOK, "Print samples as they come, one JSON object a line."),
    "snapshot": Entry("operate.snapshot:snapshot", _LOOK, "Take a consistent copy of the history away."),
    "drain": Entry("operate.fleet:drain", _OPERATE, "Keep new work off devices or hosts."),
    "undrain": Entry("operate.fleet:undrain", _OPERATE, "Let work on drained devices or hosts again."),
    "evict": Entry("operate.fleet:evict", _OPERATE, "Take a lease back from its owner."),
    "health": Entry("operate.health:health", _OPERATE, "Whether a part is well, by the exit code."),
    "simulate": Entry(
        "operate.simulate:simulate", _OPERATE, "Replay a trace of requests through the planner's own core."
    ),
    "context": Entry("operate.context:context", _OPERATE, "Name the buses that you use, and choose one."),
    "config": Entry("operate.config:config", _OPERATE, "Show the configuration, and where each value is from."),
    "auth": Entry("operate.auth:auth", _OPERATE, "Users of the bus, what each may do, keys and certificates."),
    "doctor": Entry("operate.doctor:doctor", _OPERATE, "Look for what is wrong, each finding with its fix."),
    "collect": Entry("services.collect:collect", _PARTS, "Collect this host's GPU telemetry and publish it."),
    "process": Entry("services.process:process", _PARTS, "Turn telemetry into history, and answer SQL."),
    "plan": Entry("services.plan:plan", _PARTS, "Answer work requests."),
    "export": Entry("services.export:export", _PARTS, "Serve the whole fleet's metrics to Prometheus."),
}
