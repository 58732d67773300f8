"""Required settings of the planner's bucket, and of the streams that it reads and publishes to.

Wrong ones would lose leases. An operator may have made a stream by hand, for instance with a maximum age, after which
the server drops a lease and its devices are granted again. At the start the planner corrects the settings that a server
can change on an existing stream, and refuses to run with others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from nats.errors import Error as NatsError
from nats.js import JetStreamContext, api

from ...bus.connect import BusUnavailable
from ...schemas import subjects
from ...schemas.values import units

log = logging.getLogger("corral.planner.bucket")

MIN_BYTES: Final = 4 * 2**20
"""Minimum size of the bucket: a smaller one has no room for a lease with many work items beside the fixed entries."""
RECORD_PART: Final = 1 / 16
"""Part of the bucket that one record may take. A server with replicas needs room for a record twice over, to write it
anew."""
FULL_PART: Final = 0.85
"""Part of the bucket beyond which no new entries are written, so that leases can still be renewed and released."""
WARN_PART: Final = 0.8


class Rule(NamedTuple):
    """Rule for one setting.

    Attributes:
        field: of the stream's configuration.
        right: returns true if a value is acceptable.
        value: that it is corrected to; None if it can't be changed.
        why: consequence of a wrong value for leases, or for their events.
    """

    field: str
    right: Callable[[Any], bool]
    value: Any
    why: str


def _none(value: Any) -> bool:
    return value is None or value <= 0


def _unset(value: Any) -> bool:
    return not value


def _is(*values: object) -> Callable[[Any], bool]:
    def right(value: Any) -> bool:
        return value in values

    return right


def _at_least(least: float) -> Callable[[Any], bool]:
    def right(value: Any) -> bool:
        return _none(value) or value >= least

    return right


_LIMITS: Final = Rule("retention", _is(None, api.RetentionPolicy.LIMITS), None, "what is read once is deleted")
_OWN: Final = Rule("mirror", _unset, None, "a copy of another stream takes no writes")
_OPEN: Final = Rule("sealed", _unset, None, "a sealed stream takes no writes")
_ANY_SIZE: Final = Rule("max_msg_size", _none, -1, "a record of a lease may be larger")

BUCKET: Final = (
    _LIMITS,
    _OWN,
    _OPEN,
    Rule("max_age", _none, 0, "leases are forgotten after it, and their devices granted a second time"),
    Rule("discard", _is(api.DiscardPolicy.NEW), api.DiscardPolicy.NEW, "a full one drops leases"),
    Rule("max_msgs", _none, -1, "more leases than that are not possible"),
    Rule("max_msgs_per_subject", _is(1), 1, "earlier values of each record fill it"),
    _ANY_SIZE,
    Rule("max_bytes", _at_least(MIN_BYTES), None, ""),
)
"""Rules for the planner's bucket."""
FACTS: Final = (
    _LIMITS,
    _OWN,
    _OPEN,
    Rule("discard", _is(None, api.DiscardPolicy.OLD), api.DiscardPolicy.OLD, "a full one takes no events"),
    Rule("max_msgs_per_subject", _none, -1, "events of a host, or of a lease, push each other out"),
    _ANY_SIZE,
    Rule("duplicate_window", _at_least(60), 120, "an event that is sent again is stored twice"),
)
"""Rules for the facts stream, which has the events."""
READ: Final = (_LIMITS,)
"""Rules for a stream that the planner reads at its start."""


def correct_settings(config: api.StreamConfig, rules: tuple[Rule, ...]) -> list[str]:
    """Correct the settings of a stream that can be changed.

    Args:
        config: as the server has it; changed in place. The caller updates the stream with it.
        rules: for this stream.

    Returns:
        A sentence for each setting that was changed.

    Raises:
        bus.BusUnavailable: a wrong setting can't be changed on an existing stream, or the bucket is too small.
    """
    changed: list[str] = []
    for rule in rules:
        value = getattr(config, rule.field)
        if rule.right(value):
            continue
        said = f"{config.name} was made with {rule.field}={getattr(value, 'value', value)}"
        if rule.field == "max_bytes":
            raise BusUnavailable(
                f"{said}, too little for leases: give it {units.format_bytes(MIN_BYTES)} at least, "
                f"with `nats stream edit {config.name} --max-bytes={MIN_BYTES}`"
            )
        if rule.value is None:
            raise BusUnavailable(
                f"{said}: {rule.why}, and that can't be changed on a stream that is there. Move what it holds to one "
                "that Corral has made"
            )
        setattr(config, rule.field, rule.value)
        changed.append(f"{said} ({rule.why}): set to {getattr(rule.value, 'value', rule.value)}")
    return changed


async def correct_streams(js: JetStreamContext) -> int:
    """Correct the settings of the streams that the planner publishes to and reads.

    Returns:
        Size limit of the facts stream, in bytes; 0 or less for none.

    Raises:
        bus.BusUnavailable: one has a wrong setting that can't be changed.
    """
    max_bytes = 0
    for name, rules in (
        (subjects.FACTS_STREAM, FACTS),
        (subjects.INVENTORY_STREAM, READ),
        (subjects.TELEMETRY_STREAM, READ),
    ):
        config = (await js.stream_info(name)).config
        changed = correct_settings(config, rules)
        if name == subjects.FACTS_STREAM:
            max_bytes = config.max_bytes or 0
        if not changed:
            continue
        try:
            await js.update_stream(config)
        except (NatsError, TimeoutError) as error:  # permissions of an earlier version, say
            log.error("%s, which failed (%r): set it by hand", "; ".join(changed), error)
        else:
            log.warning("%s", "; ".join(changed))
    return max_bytes
