"""Xids of each device: a fatal one stays until the device is reset, even if collector or exporter restart meanwhile.

A pure fold of events. It is no reset that the driver asks for no recovery, or that a collector has started. These are
resets: an event that names one, a recovery that the driver has asked for and no longer does, another boot of the host,
or an energy counter that began anew. That counter is filtered like any other (`schemas/counters.py`): a tiny decrease
or a momentary misreading is no reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct, field

from ..schemas.counters import Held, hold
from ..schemas.metrics import METRICS
from ..schemas.telemetry import DeviceEvent, Severity

WINDOW_SECONDS: Final = 300
"""Window of `DCGM_EXP_XID_ERRORS_COUNT`, as in dcgm-exporter."""
HARMLESS_SECONDS: Final = 86_400.0
"""Time for which the last Xid is shown if it left the device healthy."""
_FATAL: Final = frozenset({Severity.RESET, Severity.HARDWARE})
_ENERGY: Final = METRICS["energy_millijoules"]
_WORDS: Final = (b"xid", b"cleared", b"recovery_action", b"device_lost")

Key = tuple[str, str]
"""A host, and the uuid of a device of it."""
_ReportedXid = tuple[str, str, int, int, str, int]


def concerns(data: bytes) -> bool:
    """True if an encoded event may concern Xids or resets: most events are clock changes, and need no decoding."""
    return any(word in data for word in _WORDS)


class Xids(Struct):
    """Xids of one device.

    Attributes:
        code: the last Xid, or the last fatal one since the device was reset; 0 without any.
        fatal: True if the device needs a reset or a look at the hardware.
        at: when that Xid was reported, seconds since the epoch.
        counts: number of reported Xids, by code.
        recent: time and code of the Xids in the last `WINDOW_SECONDS`, and of some before.
        asked: True if the driver has asked for a recovery and still does.
        energy: the device's energy counter in the last event that has it, mJ; None if none has.
        held: accepted value of that counter in samples; None before the first.
        boot: boot id of the host when the device was last reported as watched; empty if unknown.
    """

    code: int = 0
    fatal: bool = False
    at: float = 0.0
    counts: dict[int, int] = field(default_factory=dict)
    recent: list[tuple[float, int]] = field(default_factory=list)
    asked: bool = False
    energy: float | None = None
    held: Held | None = None
    boot: str = ""

    def shown(self, now: float) -> int:
        """Code to show; 0 for an old one that left the device healthy."""
        return self.code if self.fatal or now - self.at < HARMLESS_SECONDS else 0

    def within(self, now: float) -> dict[int, int]:
        """Number of Xids in the last `WINDOW_SECONDS`, by code."""
        found: dict[int, int] = {}
        for at, code in self.recent:
            if now - at < WINDOW_SECONDS:
                found[code] = found.get(code, 0) + 1
        return found

    def take(self, event: DeviceEvent, at: float) -> bool:
        """Fold an event in; True if it means that the device was reset."""
        energy, boot = event.data.get("energy_millijoules"), event.data.get("boot")
        energy = float(energy) if isinstance(energy, int | float) else None
        boot = boot if isinstance(boot, str) else ""
        reset = False
        if event.kind == "xid":
            self._count(event.code, at)
            fatal = event.severity in _FATAL
            if fatal or not self.fatal:
                self.code, self.fatal, self.at = event.code, fatal, at
        elif event.severity in _FATAL:
            self.asked = self.asked or event.kind == "recovery_action"
        elif event.severity is Severity.CLEARED:
            reset = self._was_reset(event, energy, boot)
            if reset:
                self.reset()
        if energy is not None:
            self.energy = energy
        self.boot = boot or self.boot
        return reset

    def reset(self) -> None:
        """Clear the state of the device after a reset; its counts stay."""
        self.code, self.fatal, self.at, self.asked, self.energy, self.held = 0, False, 0.0, False, None, None

    def look(self, energy: float, now: float) -> bool:
        """Take the energy counter of a sample; True if it means that the device was reset.

        Args:
            energy: the counter, in mJ.
            now: monotonic seconds.
        """
        before = self.held
        if before is None and self.energy is not None:
            before = Held(self.energy, now)
        held = hold(before, _ENERGY, energy, now)
        began_anew = before is not None and _began_anew(before.value, held.value)
        if began_anew:
            self.reset()
        self.held = held
        return began_anew

    def _count(self, code: int, at: float) -> None:
        # Replaced, never changed in place: a scrape reads them in another thread.
        self.counts = self.counts | {code: self.counts.get(code, 0) + 1}
        self.recent = [*(reported for reported in self.recent if reported[0] > at - WINDOW_SECONDS), (at, code)]

    def _was_reset(self, event: DeviceEvent, energy: float | None, boot: str) -> bool:
        said = event.data.get("reset")
        if isinstance(said, bool):
            return said
        if event.kind == "recovery_action":
            return self.asked
        if event.kind == "device_started":
            known = self.energy if self.held is None else self.held.value
            began_anew = energy is not None and known is not None and _began_anew(known, energy)
            return self.asked or began_anew or bool(boot and self.boot and boot != self.boot)
        return True


def _began_anew(before: float, energy: float) -> bool:
    """True if a counter that reads lower counts from 0: after a gap one that lacks 1% does (docs/counters.md)."""
    return energy * 100 <= before * 99


class History:
    """Xids of a fleet, from a stream that is read and from live events meanwhile: each event counts once."""

    def __init__(self) -> None:
        self.settled = True
        """False during the first reading of the stream: a device without known events may have had an Xid."""
        self._read_once = False
        self._of: dict[Key, Xids] = {}
        self._reported: set[_ReportedXid] = set()
        self._stored: tuple[dict[Key, Xids], set[_ReportedXid]] | None = None
        self._since: list[tuple[DeviceEvent, float]] = []

    def of(self, host: str, device: str) -> Xids | None:
        """Xids of one device; None if no Xid or start of it was reported."""
        return self._of.get((host, device))

    def forget(self, host: str) -> None:
        """Forget a host that is gone, with the Xids of its devices."""
        self._of = {key: found for key, found in self._of.items() if key[0] != host}
        self._reported = {mark for mark in self._reported if mark[0] != host}

    def take(self, event: DeviceEvent, at: float) -> bool:
        """Take a live event; True if it means that its device was reset."""
        if self._stored is not None:
            self._since.append((event, at))
        return _take(self._of, self._reported, event, at)

    def begin(self) -> None:
        """Start reading the stream: `take_stored` then gets its events, oldest first."""
        self.settled = self._read_once
        self._stored, self._since = ({}, set()), []

    def take_stored(self, event: DeviceEvent, at: float, parts: Sequence[str] = ()) -> None:
        """Take an event of the stream; a reset of its device resets the `parts`, too."""
        if self._stored is not None and _take(*self._stored, event, at):
            for part in parts:
                if (found := self._stored[0].get((event.host, part))) is not None:
                    found.reset()

    def end(self, *, complete: bool = True) -> None:
        """End reading the stream; if it could not be read to the end, the earlier state stays."""
        stored, self._stored = self._stored, None
        since, self._since = self._since, []
        self.settled = self._read_once = True
        if stored is None or not complete:
            return
        of, reported = stored
        for event, at in since:
            _take(of, reported, event, at)
        for key, found in self._of.items():
            fresh = of.setdefault(key, found)  # a stream keeps events for a month
            codes = fresh.counts.keys() | found.counts.keys()
            fresh.counts = {code: max(fresh.counts.get(code, 0), found.counts.get(code, 0)) for code in codes}
            if found.held is not None and fresh is not found:
                if fresh.energy is not None and _began_anew(fresh.energy, found.held.value):
                    fresh.reset()  # samples show a reset that no event of the stream reports
                fresh.held = found.held
            if fresh.energy is None:
                fresh.energy = found.energy
        self._of, self._reported = of, reported


def _take(of: dict[Key, Xids], reported: set[_ReportedXid], event: DeviceEvent, at: float) -> bool:
    if event.device is None:
        return False
    mark: _ReportedXid = (event.host, event.agent, event.sequence, event.time_ns, event.kind, event.code)
    if mark in reported:
        return False
    reported.add(mark)
    key: Key = (event.host, event.device)
    if key not in of and event.kind not in ("xid", "device_started"):
        return False
    return of.setdefault(key, Xids()).take(event, at)
