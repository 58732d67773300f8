"""Login links that work once."""

from __future__ import annotations

from pathlib import Path


def login_link(state: Path) -> str | None:
    """Create a login link that works once, for the dashboard of a state folder; None if it isn't running."""
    from .accounts import Accounts

    try:
        url = (state / "url").read_text().strip()
    except FileNotFoundError:
        return None
    return f"{url}login?token={Accounts(state).new_link()}"
