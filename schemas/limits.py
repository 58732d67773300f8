"""Numbers and names that several parts must agree on."""

from __future__ import annotations

from typing import Final

STALE_AFTER_SECONDS: Final = 10.0
"""Age of its newest sample at which a device takes no work, unless the planner is set otherwise."""

MAX_WAIT_SECONDS: Final = 86_400
"""Maximum time that a work request may wait in the queue."""

MAX_TTL_SECONDS: Final = 30 * 86_400
"""Maximum time to live of a lease, from one renewal to the next."""

GRACE_SECONDS: Final = 30.0
"""Time between the notice of a preemption and the end of the lease, unless the request gives another."""

MAX_GRACE_SECONDS: Final = 3600
"""Maximum time between the notice of a preemption and the end of the lease; a holder may put the end off once."""

MAX_OUT_OF_ORDER: Final = 64
"""Span of one agent's message numbers that may be on their way at once, so that a stream may hold them out of order.

Deduplication looks back as far: within it a message that comes late differs from a duplicate."""

LEASE_VARIABLE: Final = "CORRAL_LEASE"
"""Environment variable with the id of the lease that a process works under."""
