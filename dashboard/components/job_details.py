"""Details of a job: command or script, working directory and environment, for those who may read it."""

from __future__ import annotations

import shlex

from ...schemas.work.jobs import JobSpec
from ..html import table, tag


def show_spec(spec: JobSpec) -> None:
    """Create the description of a job as it was submitted."""
    facts = [
        ("Working directory", spec.directory or "home of the account"),
        ("Output", spec.output or "a file of the runner's"),
        ("Image", spec.image),
        ("Retries", str(spec.retries) if spec.retries else ""),
        ("Queued again after a preemption", "yes" if spec.requeue else ""),
        ("Signal at a preemption", spec.preempt_signal),
        ("Processes on each host", str(spec.tasks_per_host) if spec.tasks_per_host > 1 else ""),
    ]
    with tag("div", "facts").style("margin-bottom:14px"):
        for name, value in facts:
            if value:
                with tag("div"):
                    tag("div", "fact-name", name)
                    tag("div", "fact-value", value)
    if spec.script:
        if spec.arguments:
            tag("div", "note", f"Arguments: {shlex.join(spec.arguments)}")
        tag("pre", "text", spec.script, tabindex=0, aria_label="Script")
    else:
        tag("pre", "text", shlex.join(spec.command), tabindex=0, aria_label="Command")
    if spec.environment:
        table(("Variable", "Value"), sorted(spec.environment.items())).style("margin-top:12px")
