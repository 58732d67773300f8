"""exo: a ring of hosts that split the layers by their memory; nothing else can be set.

From exo's `src/exo/master/placement_utils.py` (`allocate_layers_proportionally`): layers in proportion to memory, by
largest remainders, and at least one for each host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .command import HostCommand, Offer, Task, by_host, copies, devices_of, visible

VERSION: Final = "1.0"


def proportional(layers: int, memory: Sequence[int]) -> list[int]:
    """Layers of each host by exo's rule."""
    total = sum(memory)
    exact = [layers * part / total for part in memory]
    found = [int(quota) for quota in exact]
    for at in sorted(range(len(memory)), key=lambda at: exact[at] - found[at], reverse=True)[: layers - sum(found)]:
        found[at] += 1
    for at, count in enumerate(found):
        if not count:
            most = max(range(len(found)), key=found.__getitem__)
            found[most] -= 1
            found[at] = 1
    return found


def offer(task: Task) -> Offer:
    """Commands for a plan."""
    refusal = _refusal(task)
    if refusal:
        return Offer(server="exo", version=VERSION, refusal=refusal)
    [stages] = copies(task.plan) or []
    commands = [
        HostCommand(host=stage.devices[0].host, environment=visible(stage.devices), arguments=["uv", "run", "exo"])
        for stage in stages
    ]
    notes = [f"then create an instance of {task.path}, by its dashboard or POST /instance on port 52415"]
    notes.append("on Linux, exo computes on the CPU unless its MLX is built for CUDA")
    return Offer(server="exo", version=VERSION, commands=commands, notes=notes)


def _refusal(task: Task) -> str:
    chains = copies(task.plan)
    if task.unconverted or task.small_cache:
        return task.unconverted or task.small_cache
    if chains is None or len(chains) != 1:
        return "exo runs one ring of whole stages, and this plan has several ways"
    [stages] = chains
    if task.plan.tensor_parallel > 1:
        return "exo's ring has one device for each stage, and this plan has groups"
    hosts = by_host(stages)
    if hosts is None or any(len(run) > 1 for _, run in hosts):
        return "exo has one stage on each host, and this plan several"
    rule = proportional(sum(stage.layers for stage in stages), [one.memory_bytes for one in devices_of(stages)])
    layers = [stage.layers for stage in stages]
    if rule != layers:
        return f"exo splits by memory, {'+'.join(map(str, rule))} layers, and this plan is {'+'.join(map(str, layers))}"
    return ""
