"""The servers that a plan may be started with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ...schemas.models.serving import ServePlan, ServeWork
from . import accelerate, exo, llama_cpp, vllm
from .command import FIRST_PORT, Offer, Task

SERVERS: Final[dict[str, Callable[[Task], Offer]]] = {
    "vllm": vllm.offer,
    "llama.cpp": llama_cpp.offer,
    "exo": exo.offer,
    "accelerate": accelerate.offer,
}
"""Servers by name."""


def offer(
    server: str,
    plan: ServePlan,
    work: ServeWork,
    path: str,
    addresses: Mapping[str, str] | None = None,
    *,
    port: int = FIRST_PORT,
    listen: str = "",
) -> Offer:
    """Commands that start a server as a plan says, or the reason why it can't express the plan.

    Args:
        server: one of `SERVERS`.
        plan: the plan.
        work: what it serves.
        path: path or name of the model, as the server loads it.
        addresses: network addresses of hosts, where known.
        port: HTTP port of the first server; those of further copies of the model follow.
        listen: address at which servers listen for requests; empty for their default.
    """
    return SERVERS[server](Task(plan, work, path, addresses or {}, port, listen))
