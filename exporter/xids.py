"""What Xids each device has had: a fatal one stays until the device was reset, whoever starts anew meanwhile.

A pure fold of events. That the driver asks for no recovery, or that a collector has started, is no reset: what says so
is an event that names one, a recovery that the driver has asked for and no longer does, another boot of the host, or an
energy counter that began anew. That counter is believed as any other is (`schemas/counters.py`): one that falls by a
hair, or was misread for a moment, ends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct, field

from ..schemas.counters import Held, hold
from ..schemas.metrics import METRICS
from ..schemas.telemetry import DeviceEvent, Severity

WINDOW_SECONDS: Final = 300
"""What `DCGM_EXP_XID_ERRORS_COUNT` looks back, as in dcgm-exporter."""
HARMLESS_SECONDS: Final = 86_400.0
"""How long the last Xid is shown where it left the device well."""
_FATAL: Final = frozenset({Severity.RESET, Severity.HARDWARE})
_ENERGY: Final = METRICS["energy_millijoules"]
_WORDS: Final = (b"xid", b"cleared", b"recovery_action", b"device_lost")

Key = tuple[str, str]
"""A host and a device of it."""
_Told = tuple[str, str, int, int, str, int]


def concerns(data: bytes) -> bool:
    """Whether an encoded event may say anything of Xids: most are changes of clocks, and need no decoding."""
    return any(word in data for word in _WORDS)


class Xids(Struct):
    """Of one device.

    Attributes:
        code: the last Xid, or the last fatal one since the device was reset; 0 without any.
        fatal: the device wants a reset or a look at the hardware.
        at: when that was told, seconds since the epoch.
        counts: how often each code was told.
        recent: when and which, in the last `WINDOW_SECONDS` and some before.
        asked: the driver has asked for a recovery, and not yet taken it back.
        energy: the device's energy counter as an event told it last, mJ; None if none has.
        held: what is believed of that counter by samples; None before the first.
        boot: of the host, when the device was last said to be watched; empty if unknown.
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
        """The code to show; 0 for one that left the device well and is old."""
        return self.code if self.fatal or now - self.at < HARMLESS_SECONDS else 0

    def within(self, now: float) -> dict[int, int]:
        """How often each code was told in the last `WINDOW_SECONDS`."""
        found: dict[int, int] = {}
        for at, code in self.recent:
            if now - at < WINDOW_SECONDS:
                found[code] = found.get(code, 0) + 1
        return found

    def take(self, event: DeviceEvent, at: float) -> bool:
        """Fold an event in; whether it said that the device was reset."""
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
        """The device is as new; what was counted was counted."""
        self.code, self.fatal, self.at, self.asked, self.energy, self.held = 0, False, 0.0, False, None, None

    def look(self, energy: float, now: float) -> bool:
        """Take the energy counter of a sample; whether it says that the device was reset.

        Args:
            energy: in mJ.
            now: seconds, monotonic.
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
        # Made anew each time: a scrape reads them in a thread of its own.
        self.counts = self.counts | {code: self.counts.get(code, 0) + 1}
        self.recent = [*(told for told in self.recent if told[0] > at - WINDOW_SECONDS), (at, code)]

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
    """Whether a counter that reads lower counts from 0: after a silence one that lacks 1% does (docs/counters.md)."""
    return energy * 100 <= before * 99


class History:
    """The Xids of a fleet, from a stream that is read and from what is told meanwhile: each event counts once."""

    def __init__(self) -> None:
        self.settled = True
        """False during the first reading: a device of which nothing is known may have had an Xid."""
        self._read_once = False
        self._of: dict[Key, Xids] = {}
        self._told: set[_Told] = set()
        self._stored: tuple[dict[Key, Xids], set[_Told]] | None = None
        self._since: list[tuple[DeviceEvent, float]] = []

    def of(self, host: str, device: str) -> Xids | None:
        """Of one device; None if nothing was ever told of it."""
        return self._of.get((host, device))

    def forget(self, host: str) -> None:
        """A host is gone, and what its devices have had with it."""
        self._of = {key: found for key, found in self._of.items() if key[0] != host}
        self._told = {mark for mark in self._told if mark[0] != host}

    def take(self, event: DeviceEvent, at: float) -> bool:
        """An event as it is told; whether it said that its device was reset."""
        if self._stored is not None:
            self._since.append((event, at))
        return _take(self._of, self._told, event, at)

    def begin(self) -> None:
        """From now on `take_stored` is given what the stream holds, oldest first."""
        self.settled = self._read_once
        self._stored, self._since = ({}, set()), []

    def take_stored(self, event: DeviceEvent, at: float, parts: Sequence[str] = ()) -> None:
        """An event of the stream; with a device its `parts` are reset."""
        if self._stored is not None and _take(*self._stored, event, at):
            for part in parts:
                if (found := self._stored[0].get((event.host, part))) is not None:
                    found.reset()

    def end(self, *, complete: bool = True) -> None:
        """The stream was read, or could not be: then what was known stays."""
        stored, self._stored = self._stored, None
        since, self._since = self._since, []
        self.settled = self._read_once = True
        if stored is None or not complete:
            return
        of, told = stored
        for event, at in since:
            _take(of, told, event, at)
        for key, found in self._of.items():
            fresh = of.setdefault(key, found)  # a stream keeps events for a month
            codes = fresh.counts.keys() | found.counts.keys()
            fresh.counts = {code: max(fresh.counts.get(code, 0), found.counts.get(code, 0)) for code in codes}
            if found.held is not None and fresh is not found:
                if fresh.energy is not None and _began_anew(fresh.energy, found.held.value):
                    fresh.reset()  # samples have said so, and the stream has no word of it
                fresh.held = found.held
            if fresh.energy is None:
                fresh.energy = found.energy
        self._of, self._told = of, told


def _take(of: dict[Key, Xids], told: set[_Told], event: DeviceEvent, at: float) -> bool:
    if event.device is None:
        return False
    mark: _Told = (event.host, event.agent, event.sequence, event.time_ns, event.kind, event.code)
    if mark in told:
        return False
    told.add(mark)
    key: Key = (event.host, event.device)
    if key not in of and event.kind not in ("xid", "device_started"):
        return False
    return of.setdefault(key, Xids()).take(event, at)
