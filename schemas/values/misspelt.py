"""Misspelt names of fields, options and variables: finds the known name that was probably meant.

A name is compared in four ways, the surest first: without its case and separators (`timeToLive`), without its units and
words of counting (`num_gpus`, `memory_gb`), by what other schedulers call the same thing (`vram`, `walltime`), and by
its letters (`gpu_memroy_bytes`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from typing import Final

MAX_NAME: Final = 64
"""Longer names are not compared: they are no typing errors, and comparing takes time."""
CLOSE: Final = 0.75
"""Ratio of letters that two names share, by difflib, from which on one is taken for the other."""

_WORD: Final = re.compile(r"[KMGT]i?B(?![A-Za-z])|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_UNITS: Final = re.compile(
    r"[kmgt]i?b|b|bytes?|(?:giga|mega)bytes?|s|secs?|seconds?|ms|millis?|milliseconds|mins|minutes?|h|hours?"
)
_COUNTING: Final = re.compile(r"n|num|number|of|count|amount|total|the|requested|request|required|wanted|list")
_SYNONYMS: Final[dict[str, str]] = {
    "accelerator count device gpu gpu_device gpu_num graphics_card nvidia_gpu nvidia_com_gpu": "gpus devices",
    "gpu_mem gpu_ram mem memory memory_gpu memory_per_device memory_per_gpu mem_per_gpu device_memory "
    "vram video_memory": "gpu_memory_bytes memory_bytes",
    "cpu_memory host_mem host_ram main_memory node_memory ram system_memory": "host_memory_bytes",
    "core cpu_core ncpus processor thread vcpu": "cpus",
    "fraction gpu_fraction gpu_part gpu_percent part share": "gpu_share",
    "device_model device_name device_type gpu_model gpu_name gpu_type gputype model_name product": "models",
    "name": "models",
    "uuid gpu_uuid": "devices",
    "more": "with_more",
    "place": "placement",
    "label": "labels host_labels",
    "gpu_vendor manufacturer": "vendors",
    "host_name hostname machine node node_name nodelist nodename server": "hosts",
    "constraint host_selector node_label node_selector selector": "host_labels",
    "annotation metadata tag": "labels",
    "domain network_topology same topology_key within_label": "within",
    "prefer preferred preferred_topology": "prefer_within",
    "cc compute_capability cuda_capability min_cc min_compute": "min_compute_capability",
    "locality placement_policy strategy topology": "placement",
    "duration expire expires expiry extend extend_by keep lease_duration lease_time lease_ttl life lifetime period "
    "time time_limit time_to_live timelimit ttl wall_time walltime": "ttl_seconds",
    "estimate expect expected_duration expected_runtime expected_time": "expected_seconds",
    "max_wait patience queue_time time_out timeout wait wait_time wait_timeout": "wait_seconds timeout_seconds",
    "id idempotency_key key": "request_id lease_id query_id snapshot_id",
    "lease": "lease_id ttl_seconds",
    "importance prio": "priority",
    "account owner_name person requester user user_name username who": "owner operator",
    "job job_name title workload workload_name": "name",
    "item task work work_item": "items",
    "limit max_row max_rows maximum row row_limit rows": "limit",
    "q query statement text": "sql",
    "output output_format": "format",
    "status": "states",
    "bytes_per_item item_memory item_size mem_per_item memory_item": "memory_per_item_bytes",
    "item_limit items_per_device max_item max_per_device": "max_items_per_device",
    "comment message note why": "reason",
    "job_id query": "query_id",
}
"""Names without units and words of counting → fields, the likeliest first."""

_MEANINGS: Final[dict[str, list[str]]] = {}
for _names, _fields in _SYNONYMS.items():
    for _name in _names.split():
        _MEANINGS.setdefault(_name, []).extend(_fields.split())


def meant(name: str, known: Collection[str]) -> str:
    """Find the known name that was probably meant.

    Args:
        name: an unknown name.
        known: names to choose from.

    Returns:
        One of them; empty where none is close.
    """
    if not 0 < len(name) <= MAX_NAME:
        return ""
    if found := same(name, known):
        return found
    words = _words(name)
    bare = _bare(words)
    for key in ("_".join(words), "_".join(bare)):
        for field in _MEANINGS.get(key, ()):
            if field in known:
                return field
    return closest(name, known)


def same(name: str, known: Collection[str]) -> str:
    """Find the known name that differs only in case and separators, or in units and counting words; empty if none."""
    words = _words(name)
    plain = "".join(words)
    for one in known:
        if "".join(_words(one)) == plain:
            return one
    bare = _bare(words)
    if bare:
        for one in known:
            if _bare(_words(one)) == bare:
                return one
    return ""


def slip(name: str, known: Iterable[str]) -> str:
    """Find the known name that differs by one letter missing, added or wrong, or by two swapped; empty if none.

    A different digit does not count: `PORT_4` follows `PORT_3`.
    """
    return next((one for one in sorted(known) if _is_slip(name, one)), "")


def _is_slip(name: str, known: str) -> bool:
    at = 0
    while at < min(len(name), len(known)) and name[at] == known[at]:
        at += 1
    one, other = name[at:], known[at:]
    if (one[:1] or other[:1]).isdigit() or one == other:
        return False
    swapped = one[1:2] + one[:1] + one[2:] == other
    return swapped or one[1:] == other or one == other[1:] or one[1:] == other[1:]


def closest(name: str, known: Iterable[str], ratio: float = CLOSE) -> str:
    """Find the known name with the most letters in common; empty where none has enough."""
    found = difflib.get_close_matches(name, sorted(known), 1, ratio) if len(name) <= MAX_NAME else []
    return found[0] if found else ""


def _words(name: str) -> list[str]:
    """Split a name into lower-case words: `gpuMemoryGB` into `gpu`, `memory`, `gb`."""
    return [word.lower() for word in _WORD.findall(name)]


def _bare(words: list[str]) -> list[str]:
    """Remove units and words of counting from a name's words, and make the rest singular."""
    kept = [re.sub(r"^n(?:um)?(?=[gc]pus?$)", "", word) for word in words]
    kept = [word for word in kept if not _UNITS.fullmatch(word) and not _COUNTING.fullmatch(word)]
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in kept]
