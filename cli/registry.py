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


_TRY: Final = "Get started"
_WORK: Final = "Use GPUs"
_JOBS: Final = "Run jobs"
_LOOK: Final = "Observe the fleet"
_OPERATE: Final = "Operate"
_PARTS: Final = "Run services"
COMMANDS: Final[dict[str, Entry]] = {
    "up": Entry(
        "local.up:up", _TRY, "Start a complete cluster on this machine: bus, collector, processor, planner, dashboard."
    ),
    "demo": Entry("local.demo:demo", _TRY, "Run a tour of Corral on a temporary cluster, in under a minute."),
    "run": Entry("work.run:run", _WORK, "Run a command under a lease on GPUs, which is released when it ends.", True),
    "shell": Entry("work.run:shell", _WORK, "Open a shell under a lease on GPUs."),
    "request": Entry(
        "work.commands:request", _WORK, "Request GPUs; print the assignment, or the reasons for the rejection."
    ),
    "renew": Entry("work.commands:renew", _WORK, "Renew a lease."),
    "release": Entry("work.commands:release", _WORK, "Release leases."),
    "saved": Entry("work.checkpoint:saved", _WORK, "Say that the work of a lease is saved."),
    "busy": Entry("work.checkpoint:busy", _WORK, "Put the end of a preemption off."),
    "resize": Entry("work.resize:resize", _WORK, "Answer the notice that an elastic lease may grow or shrink."),
    "leases": Entry("work.commands:leases", _WORK, "List leases."),
    "prompt": Entry("work.prompt:prompt", _WORK, "Print the GPUs that you hold, for the prompt of a shell."),
    "explain": Entry("work.commands:explain", _WORK, "Predict the outcome of a request, device by device."),
    "fit": Entry("work.models.fit:fit", _WORK, "Find out whether the free GPUs can serve a model, how, and how fast."),
    "serve": Entry(
        "work.models.serve:serve", _WORK, "Lease the GPUs of a plan for a model; print its commands, or start them."
    ),
    "queue": Entry("work.commands:queue", _WORK, "List queued requests."),
    "withdraw": Entry("work.commands:withdraw", _WORK, "Withdraw queued requests."),
    "submit": Entry("work.jobs.submit:submit", _JOBS, "Submit a script or a command as a job, and go home.", True),
    "jobs": Entry("work.jobs.show:jobs", _JOBS, "List jobs."),
    "job": Entry("work.jobs.show:job", _JOBS, "Show a job: its tasks, why it waits or how it ended, and what it used."),
    "logs": Entry("work.jobs.output:logs", _JOBS, "Show what a job prints."),
    "attach": Entry("work.jobs.attach:attach", _JOBS, "Open a shell, or run a command, inside a running job."),
    "cancel": Entry("work.jobs.show:cancel", _JOBS, "Cancel jobs or tasks of an array."),
    "hold": Entry("work.jobs.show:hold", _JOBS, "Keep waiting jobs from being started."),
    "unhold": Entry("work.jobs.show:unhold", _JOBS, "Let held jobs be started again."),
    "resubmit": Entry("work.jobs.show:resubmit", _JOBS, "Queue tasks that have ended again."),
    "top": Entry("top.command:top", _LOOK, "Show the fleet live in the terminal."),
    "dashboard": Entry("services.dashboard:dashboard", _LOOK, "Serve the dashboard: heat map, timelines, leases, SQL."),
    "devices": Entry("operate.fleet:devices", _LOOK, "List devices with their load, free memory and leases."),
    "ps": Entry("operate.ps:ps", _LOOK, "List the processes on GPUs and their leases."),
    "idle": Entry("operate.idle:idle", _LOOK, "List leases on idle GPUs; predict what a rule for them would do."),
    "fleet": Entry("operate.fleet:fleet", _LOOK, "Show totals of the fleet."),
    "query": Entry("operate.query:query", _LOOK, "Query the history in SQL."),
    "report": Entry("operate.report:report", _LOOK, "Report on the use and the cost of the fleet in a period."),
    "watch": Entry("operate.fleet:watch", _LOOK, "Stream samples as JSON lines."),
    "snapshot": Entry("operate.snapshot:snapshot", _LOOK, "Download a consistent copy of the history."),
    "notify": Entry(
        "operate.notify:notify", _LOOK, "Have e-mail, a chat or a webhook told when something happens: rules and tests."
    ),
    "drain": Entry("operate.fleet:drain", _OPERATE, "Keep new work off devices or hosts."),
    "undrain": Entry("operate.fleet:undrain", _OPERATE, "Allow new work on drained devices or hosts again."),
    "reserve": Entry("operate.reserve:reserve", _OPERATE, "Book GPUs for a time, for owners or a group."),
    "evict": Entry("operate.fleet:evict", _OPERATE, "Evict a lease: end it against its owner's will."),
    "group": Entry(
        "operate.groups.commands:group",
        _OPERATE,
        "Manage groups that share the fleet: guarantees, limits, weights, members.",
    ),
    "preempt": Entry("operate.fleet:preempt", _OPERATE, "Preempt a lease: end it after a notice to its holder."),
    "plan-moves": Entry(
        "operate.moves:plan_moves", _OPERATE, "Find the fewest leases to preempt for free hosts, or for a request."
    ),
    "health": Entry("operate.health:health", _OPERATE, "Run health checks; the exit code is the result."),
    "simulate": Entry(
        "operate.simulate:simulate", _OPERATE, "Replay a trace of requests with the planner's placement code."
    ),
    "login": Entry("operate.login:login", _TRY, "Log in to a fleet with your organization's account."),
    "logout": Entry("operate.login:logout", _TRY, "End a login before its time."),
    "context": Entry("operate.context:context", _OPERATE, "Manage named connections, and select one."),
    "config": Entry(
        "operate.config:config", _OPERATE, "Show the configuration with the source of each value, and change it."
    ),
    "auth": Entry("operate.auth:auth", _OPERATE, "Manage users of the bus, their permissions, keys and certificates."),
    "doctor": Entry(
        "operate.doctor:doctor", _OPERATE, "Diagnose this host and the fleet, with a fix for each finding."
    ),
    "collect": Entry("services.collect:collect", _PARTS, "Collect this host's GPU telemetry and publish it."),
    "runner": Entry("services.runner:runner", _PARTS, "Run the jobs of this host."),
    "process": Entry("services.process:process", _PARTS, "Store telemetry as history, and answer SQL queries."),
    "plan": Entry("services.plan:plan", _PARTS, "Run the planner, which grants leases."),
    "login-service": Entry(
        "services.login:login_service", _PARTS, "Let people log in with their organization's account."
    ),
    "notifier": Entry("services.notifier:notifier", _PARTS, "Send notifications by e-mail, chat and webhook."),
    "export": Entry("services.export:export", _PARTS, "Serve the fleet's metrics for Prometheus."),
    "serve-http": Entry(
        "services.serve_http:serve_http", _PARTS, "Serve the bus over HTTP, for those who can't speak NATS."
    ),
}
