"""Limits that both sides of the bus have to agree on."""

from __future__ import annotations

from typing import Final

SPAN_MESSAGES: Final = 64
"""Messages of one agent's run may be out of order in a stream by less than this: a collector never has numbers further
apart in flight, and the history's deduplication looks back as far."""
