"""Links to the pages of hosts and devices, wherever these are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

from ..html import tag

_SHOWN: Final = 4


def host_path(host: str) -> str:
    """Path of a host's page."""
    return f"/host/{quote(host, safe='')}"


def device_path(uuid: str) -> str:
    """Path of a device's page."""
    return f"/device/{quote(uuid, safe='')}"


def host_link(host: str, words: str = "") -> None:
    """Show the name of a host, or other words, as a link to its page."""
    tag("a", "", words or host, href=host_path(host))


def place_links(hosts: Sequence[str], device: str = "", index: int | None = None) -> None:
    """Show hosts as links, and a device of theirs; a dash without either."""
    with tag("span"):
        for at, host in enumerate(hosts[:_SHOWN]):
            if at:
                tag("span", text=", ")
            host_link(host)
        if len(hosts) > _SHOWN:
            tag("span", "note", f" and {len(hosts) - _SHOWN} more", title=", ".join(hosts))
        if hosts and device:
            tag("span", text=" · ")
        if device:
            tag("a", "", f"GPU {index}" if index is not None else device[:12], href=device_path(device), title=device)
        if not hosts and not device:
            tag("span", text="–")
