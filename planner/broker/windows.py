"""Booked windows: operators book and cancel them; the fleet takes them in, and they begin and end by the clock.

Devices that fail, are drained or lost after they were chosen are replaced by others that are free.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...bus.elapsed import elapsed_seconds
from ...bus.tasks import BackgroundTasks
from ...schemas import codec
from ...schemas.requests import Error, Grant, Lease, LeaseState, Preemption, Rejection, RejectionCode, WorkRequest
from ...schemas.values import globs
from ...schemas.work.drains import DrainSpan
from ...schemas.work.windows import (
    MAX_REPLACED,
    MAX_WINDOWS,
    MissingDevice,
    Replacement,
    Window,
    WindowAction,
    WindowFilter,
    WindowLease,
    Windows,
    WindowState,
    WindowStatus,
)
from ..durable.store import REPLACED, WINDOWS, Deposed, Store, WriteFailed
from ..fleet.bookings import MARGIN_SECONDS, Booking, Party, limit, no_groups, time_words
from ..fleet.device import Device
from ..fleet.events import Booked
from ..fleet.fleet import Fleet, advance, apply
from ..leases.ledger import Ledger, clock
from ..leases.lifecycle import Refused, preemptible_from
from ..windows.choice import Candidate, Wish, able, choose, soonest
from ..windows.occurrences import InvalidWindow, bookings_of, occurrences, party_of
from ..windows.replacement import PATIENCE_SECONDS, missing, passing, substitutes
from .operator_changes import refusals
from .pending import Responder
from .waiting import query_costs

log = logging.getLogger("corral.planner.broker.windows")

PAST_SECONDS: Final = 60.0
"""A window may begin so long ago: the operator's clock, or patience, may differ."""
_RETRY_SECONDS: Final = 5.0
_NOTICE_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 1.0
_LOOK_SHARE: Final = 0.01
"""Part of the time that looking for missing devices may take."""


class NotEnough(Exception):
    """There are not enough devices for a window; `rejection` is the answer."""

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.message)
        self.rejection = rejection


class Booker:
    """Stores and applies the booked windows of a term.

    Args:
        fleet: to which they apply.
        ledger: leases of the term.
        store: the bucket.
        term: revision of the leader's key.
        windows: as read from the bucket.
        replaced: devices that they got in place of others, likewise.
        freed: called when devices may have come free.
        deposed: called when a write was refused since another planner leads.
        group_of: returns the group of an owner.
    """

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        store: Store,
        term: int,
        windows: Sequence[Window],
        replaced: Mapping[str, Sequence[Replacement]],
        freed: Callable[[], None],
        deposed: Callable[[], None],
        group_of: Callable[[str], str] = no_groups,
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._store = store
        self._term = term
        self._windows = {window.window_id or "": window for window in windows if _readable(window)}
        self._replaced = {key: list(found) for key, found in replaced.items() if key in self._windows}
        self._missing_since: dict[str, float] = {}
        self._look_at = -math.inf
        self._times: dict[str, list[Booking]] = {}
        self._freed = freed
        self._deposed = deposed
        self._group_of = group_of
        self._lock = asyncio.Lock()
        self._tasks = BackgroundTasks()
        self._sweep_at = -math.inf
        self._notices: list[tuple[float, str, str]] = []
        self.apply(_now())

    def apply(self, now: float) -> None:
        """Have the fleet take in all windows: at the begin of a term, and when windows or groups have changed."""
        self._times = {window_id: occurrences(window) for window_id, window in self._windows.items()}
        bookings = bookings_of(self._windows.values(), self._times, now, self._group_of)
        if bookings or self._fleet.bookings:
            advance(self._fleet, now)
            apply(self._fleet, Booked(bookings))
            self._freed()
        self._notices = self._due_notices(now)

    async def act(self, action: WindowAction, caller: Responder) -> None:
        """Book or cancel a window, store that, and answer with it."""
        async with refusals(action, caller, self._deposed):
            try:
                async with self._lock:
                    reply: Struct = await self._act(action)
            except NotEnough as short:
                reply = short.rejection
            except InvalidWindow as error:
                reply = Error(code="invalid", message=str(error), field=error.field)
            await caller.answer(reply)

    async def _act(self, action: WindowAction) -> Windows:
        if (action.book is None) == (action.cancel is None):
            raise Refused("invalid", "Give either a window to book, or the id of one to cancel", "$.book")
        if action.book is not None:
            return await self._book(action.book, action)
        return await self._cancel(action.cancel or "", action)

    def listing(self, only: WindowFilter) -> Windows:
        """Windows that match a filter, soonest first; those that are over are gone."""
        now = _now()
        found = [
            self._status(window, now)
            for window_id, window in self._windows.items()
            if only.window_id in (None, window_id)
            and (only.owner is None or window_id in self._fleet.bookings.admitted(only.owner))
        ]
        found = [status for status in found if status.state is not WindowState.OVER]
        return Windows(windows=sorted(found, key=lambda status: (status.starts_at, status.window.window_id)))

    def maintenance(self, now: float) -> list[DrainSpan]:
        """Hosts and devices that are in maintenance, each with begin and planned end."""
        return [
            DrainSpan(
                target=target,
                since=_time(booking.starts_at),
                until=_time(booking.ends_at),
                reason=window.reason,
                operator=window.operator,
                window=window_id,
            )
            for window_id, window in self._windows.items()
            if window.maintenance
            for booking in self._times[window_id]
            if booking.starts_at <= now < booking.ends_at
            for target in (
                *(f"host:{name}" for name in sorted(self._hosts(window))),
                *(f"device:{uuid}" for uuid in window.devices),
            )
        ]

    @property
    def cost(self) -> float:
        """Cost of a listing, in seconds."""
        return query_costs.windows(sum(len(window.devices) for window in self._windows.values()))

    def tick(self, now: float) -> None:
        """Preempt leases for windows that close soon, replace missing devices, and forget windows that are over."""
        if self._notices and self._notices[0][0] <= now:
            for at, lease_id, window_id in self._notices:
                if at <= now:
                    self._tasks.start(self._preempt(lease_id, window_id))
            # A notice may fail, or be withdrawn by those whom it was for: it is repeated until the lease has ended.
            again = now + _NOTICE_SECONDS
            due = self._due_notices(now)
            self._notices = sorted((at if at > now else again, lease_id, window_id) for at, lease_id, window_id in due)
        if self._lock.locked():
            return
        if self._windows and now >= self._look_at:
            self._look_at = now + max(_LOOK_SECONDS, self.cost / _LOOK_SHARE)
            if any(self._to_replace(window, now) for window in self._windows.values()):
                self._tasks.start(self._replace(now))
                return
        if now < self._sweep_at:
            return
        ends = [times[-1].ends_at for times in self._times.values()]
        over = bool(ends) and min(ends) <= now
        self._sweep_at = now + _RETRY_SECONDS if over else min(ends, default=math.inf)
        if over:
            self._tasks.start(self._sweep(now))

    def granted(self, lease: Lease) -> None:
        """Note a new lease: if it is preemptible, it may be on devices that are booked later."""
        devices = (self._fleet.devices.get(grant.device) for grant in lease.grants)
        hosts = (self._fleet.hosts.get(grant.host) for grant in lease.grants)
        if lease.preemptible and any(held is not None and held.bookings for held in chain(devices, hosts)):
            self._notices = self._due_notices(_now())

    async def close(self) -> None:
        """End what is in flight."""
        await self._tasks.cancel()

    # Changes

    async def _book(self, wanted: Window, action: WindowAction) -> Windows:
        now = _now()
        if wanted.window_id is None:
            wanted = replace(wanted, window_id=secrets.token_hex(4))
        signed = replace(wanted, operator=action.operator or wanted.operator, booked_at=None)
        before = self._windows.get(wanted.window_id or "")
        if before is not None:
            if replace(before, booked_at=None, devices=before.devices if wanted.devices else []) != signed:
                raise Refused("conflict", f"Window {wanted.window_id} is booked already, with other fields", "$.book")
            return Windows(windows=[self._status(before, now)])
        self._check(wanted, now)
        window = signed if wanted.maintenance else replace(signed, devices=self._chosen(signed, now))
        window = replace(window, booked_at=datetime.fromtimestamp(now, UTC))
        if action.dry_run:
            return Windows(windows=[self._status(window, now)])
        if len(self._windows) >= MAX_WINDOWS:
            raise Refused("invalid", f"{MAX_WINDOWS} windows are booked: cancel one first", "$.book")
        # From now on, so that nothing is granted there while it is written.
        await self._change({**self._windows, window.window_id or "": window}, now)
        return Windows(windows=[self._status(window, now)])

    async def _cancel(self, window_id: str, action: WindowAction) -> Windows:
        now = _now()
        window = self._windows.get(window_id)
        if window is None:
            raise Refused("not_found", f"There is no window {window_id!r}: it was canceled, or is over", "$.cancel")
        reply = Windows(windows=[self._status(window, now)])
        if not action.dry_run:
            await self._change({key: other for key, other in self._windows.items() if key != window_id}, now)
        return reply

    async def _sweep(self, now: float) -> None:
        async with self._lock:
            left = {key: window for key, window in self._windows.items() if self._times[key][-1].ends_at > now}
            try:
                await self._change(left, now)
            except Deposed:
                self._deposed()
            except WriteFailed:
                return  # the next turn tries again
            self._sweep_at = -math.inf

    async def _change(
        self, windows: dict[str, Window], now: float, replaced: Mapping[str, Sequence[Replacement]] | None = None
    ) -> None:
        """Apply windows, and store them; those of before apply again if that fails.

        Args:
            windows: all windows, by their ids.
            now: seconds.
            replaced: further devices that windows got in place of others.
        """
        written = codec.encode(list(windows.values()), codec.JSON)
        if len(written) > self._store.max_record_bytes and len(windows) > len(self._windows):
            raise WriteFailed(f"{len(windows)} windows take {len(written)} bytes: cancel some")
        before, self._windows = self._windows, windows
        self.apply(now)
        try:
            await self._store.put(WINDOWS, written, self._term)
        except BaseException:
            self._windows = before
            self.apply(_now())
            raise
        self._sweep_at = -math.inf
        await self._keep_replaced(replaced or {})

    async def _keep_replaced(self, more: Mapping[str, Sequence[Replacement]]) -> None:
        """Store which devices were replaced. It only informs: if the bucket refuses it, the next change stores it."""
        kept = {key: found for key, found in self._replaced.items() if key in self._windows}
        for key, found in more.items():
            kept[key] = [*kept.get(key, []), *found][-MAX_REPLACED:]
        if kept == self._replaced:
            return
        self._replaced = kept
        try:
            await self._store.put(REPLACED, codec.encode(kept, codec.JSON), self._term)
        except WriteFailed as error:
            log.warning("the list of replaced devices is not stored: %s", error)

    # Devices

    def _check(self, window: Window, now: float) -> None:
        """Check that a window can be booked.

        Raises:
            Refused, InvalidWindow: it can't.
        """
        times = occurrences(window)
        if times[0].starts_at < now - PAST_SECONDS:
            raise InvalidWindow("The window would begin in the past", "starts_at")
        if times[0].ends_at <= now:
            raise InvalidWindow("The window would be over already", "ends_at")
        if not window.reason.strip():
            raise InvalidWindow("Say why: a window needs a reason", "reason")
        if window.maintenance:
            self._check_maintenance(window)
            return
        if not window.gpus:
            raise InvalidWindow("Say how many devices to book", "gpus")
        if not window.owners and window.group is None:
            raise InvalidWindow("Say whom the window is for: owners, or a group", "owners")
        if window.devices or window.host_labels:
            raise InvalidWindow("The planner chooses the devices: name models, or hosts", "devices")

    def _check_maintenance(self, window: Window) -> None:
        if window.gpus or window.owners or window.group is not None or window.models:
            raise InvalidWindow("Maintenance is for no one, and of whole hosts or devices", "maintenance")
        if not (window.hosts or window.devices or window.host_labels):
            raise InvalidWindow("Name the hosts, devices or host_labels", "hosts")
        for field, names, known in (
            ("devices", window.devices, self._fleet.devices),
            ("hosts", window.hosts, self._fleet.hosts),
        ):
            for at, name in enumerate(names):
                if name not in known:
                    raise Refused("not_found", f"The fleet has no {field[:-1]} {name!r}", f"$.book.{field}[{at}]")

    def _chosen(self, window: Window, now: float) -> list[str]:
        """Devices for a window.

        Raises:
            NotEnough: there are not enough that are free when it begins.
        """
        advance(self._fleet, now)
        candidates = list(self._candidates(window, window.starts_at.timestamp() - window.lead_seconds))
        wish = Wish(window.gpus, occurrences(window), party_of(window))
        parties = self._fleet.bookings.parties
        chosen = choose(candidates, wish, parties)
        if chosen is None:
            raise NotEnough(_rejection(window, candidates, wish, parties, soonest(candidates, wish, parties)))
        return [candidate.uuid for candidate in chosen]

    def _candidates(self, window: Window, closes: float) -> Iterator[Candidate]:
        """Whole devices of a window's models and hosts that could take work now, but for leases and windows.

        Args:
            window: that needs devices.
            closes: time by which leases on them must have ended.
        """
        hosts = [glob.lower() for glob in window.hosts]
        models = [glob.lower() for glob in window.models]
        for name, host in self._fleet.hosts.items():
            if hosts and not globs.matches_any(name.lower(), hosts):
                continue
            for device in host.devices:
                if device.blocked or device.info.mig_parent or (device.in_use and not device.holders):
                    continue
                if not models or globs.matches_any(device.info.name.lower(), models):
                    yield self._candidate(device, window, closes)

    def _candidate(self, device: Device, window: Window, closes: float) -> Candidate:
        starts = closes + window.lead_seconds
        ends = {lease_id: self._ends_at(lease_id) for lease_id in device.holders}
        # Those of a window just before it, for the same owners, end with that.
        ends = {
            lease_id: end for lease_id, end in ends.items() if end > starts or not self._continues(lease_id, window)
        }
        late = {lease_id: self._gone_at(lease_id) for lease_id, end in ends.items() if end > closes}
        free_at = max((ends | late).values(), default=-math.inf)
        return Candidate(device.uuid, device.host, device.index, free_at, device.bookings, bool(late))

    def _ends_at(self, lease_id: str) -> float:
        """Time by which a lease has surely ended; infinite if it has no limit, or is being granted just now."""
        record = self._ledger.table.get(lease_id)
        ends_at = None if record is None else record.lease.ends_at
        return math.inf if ends_at is None else ends_at.timestamp()

    def _continues(self, lease_id: str, window: Window) -> bool:
        """True if a lease is in a window of before that is for the same owners."""
        lease = self._lease(lease_id)
        before = None if lease is None else self._windows.get(lease.window)
        return before is not None and party_of(before).same(party_of(window))

    def _in_own(self, lease: Lease, window: Window) -> bool:
        """True if a lease is in a window, or in one of before that goes on in it."""
        return lease.window != "" and (window.window_id or "") in self._fleet.bookings.admitted(lease.owner)

    # Replacement

    def _missing(self, window: Window, now: float) -> dict[str, str]:
        """Devices of a window that can't take work, each with the reason; without those on which its leases go on."""
        left = [time for time in self._times.get(window.window_id or "", ()) if time.ends_at > now]
        if window.maintenance or not left:
            return {}
        found = missing(self._fleet, window.devices, left, self._fleet.bookings.parties)
        return {uuid: reason for uuid, reason in found.items() if not self._serves(uuid, window)}

    def _serves(self, uuid: str, window: Window) -> bool:
        """True if a lease that is in a window goes on on a device."""
        device = self._fleet.devices.get(uuid)
        leases = () if device is None else map(self._lease, device.holders)
        return any(lease is not None and self._in_own(lease, window) for lease in leases)

    def _to_replace(self, window: Window, now: float) -> dict[str, str]:
        """Missing devices of a window that are not expected back by themselves, each with the reason."""
        found = self._missing(window, now)
        for uuid in window.devices:
            if uuid not in found:
                self._missing_since.pop(uuid, None)
        for uuid in found:
            self._missing_since.setdefault(uuid, now)
        return {
            uuid: reason
            for uuid, reason in found.items()
            if not passing(self._fleet, uuid) or now - self._missing_since[uuid] >= PATIENCE_SECONDS
        }

    async def _replace(self, now: float) -> None:
        """Replace devices of windows, as far as others are free."""
        async with self._lock:
            advance(self._fleet, now)
            for window_id, window in list(self._windows.items()):
                started = elapsed_seconds()
                found = self._replacements(window, now)
                self._look_at = max(self._look_at, now + (elapsed_seconds() - started) / _LOOK_SHARE)
                if not found:
                    continue
                gone = {one.device for one in found}
                devices = [uuid for uuid in window.devices if uuid not in gone] + [one.by_device for one in found]
                try:
                    changed = {**self._windows, window_id: replace(window, devices=devices)}
                    await self._change(changed, now, {window_id: found})
                except Deposed:
                    self._deposed()
                    return
                except WriteFailed as error:
                    log.warning("devices of window %s are not replaced yet: %s", window_id, error)
                    return
                for one in found:
                    log.warning(
                        "window %s has %s on %s in place of %s: %s",
                        window_id,
                        one.by_device,
                        one.by_host,
                        one.device,
                        one.reason,
                    )
                    self._missing_since.pop(one.device, None)

    def _replacements(self, window: Window, now: float) -> list[Replacement]:
        """Choose devices in place of those of a window that are missing, as far as others are free."""
        reasons = self._to_replace(window, now)
        if not reasons:
            return []
        times = [time for time in self._times[window.window_id or ""] if time.ends_at > now]
        first, kept = times[0], set(window.devices)
        closes = max(first.closes_at, now)
        candidates = [one for one in self._candidates(window, closes) if one.uuid not in kept]
        # Once it has closed, a device on which a lease is preempted first is better than none.
        by = closes if closes == first.closes_at else first.ends_at
        hosts = {device.host for uuid, device in self._known(window) if uuid not in reasons}
        wish = Wish(len(reasons), times, party_of(window))
        chosen = substitutes(candidates, wish, self._fleet.bookings.parties, hosts, by)
        return [
            Replacement(
                device=uuid,
                host=self._host_of(uuid),
                by_device=other.uuid,
                by_host=other.host,
                time=_time(now),
                reason=reason,
            )
            for (uuid, reason), other in zip(reasons.items(), chosen, strict=False)
        ]

    def _known(self, window: Window) -> list[tuple[str, Device]]:
        return [(uuid, self._fleet.devices[uuid]) for uuid in window.devices if uuid in self._fleet.devices]

    def _host_of(self, uuid: str) -> str:
        device = self._fleet.devices.get(uuid)
        return "" if device is None else device.host

    # Preemption

    def _gone_at(self, lease_id: str) -> float:
        """Time by which a preemptible lease can have ended; infinite if it can't be preempted.

        Its holder may put the end off by the grace again.
        """
        lease = self._lease(lease_id)
        if lease is None or not lease.preemptible:
            return math.inf
        return max(_now(), preemptible_from(lease).timestamp()) + 2 * lease.grace_seconds + MARGIN_SECONDS

    def _due_notices(self, now: float) -> list[tuple[float, str, str]]:
        """Preemptible leases that would still be on a window's devices as these close, soonest first.

        Each with the time of its notice, its id and that of the window.
        """
        found: set[tuple[float, str, str]] = set()
        for window_id, window in self._windows.items():
            first = next((time for time in self._times[window_id] if time.ends_at > now), None)
            if first is None:
                continue
            for lease_id in self._held(window, self._devices(window)):
                lease = self._lease(lease_id)
                if lease is None or not _preempts(window, lease) or self._in_own(lease, window):
                    continue
                if self._ends_at(lease_id) > first.closes_at:
                    at = first.closes_at - 2 * lease.grace_seconds - MARGIN_SECONDS
                    found.add((at, lease_id, window_id))
        return sorted(found)

    async def _preempt(self, lease_id: str, window_id: str) -> None:
        """Give the notice of a preemption. One that fails is repeated."""
        lease, window = self._lease(lease_id), self._windows.get(window_id)
        if lease is None or window is None:
            return
        now, words = clock(), party_of(window).words
        notice = Preemption(
            notified_at=now,
            ends_at=now + timedelta(seconds=lease.grace_seconds),
            reason=f"{words} begins" if window.maintenance else f"its devices are booked for {words} ({window.reason})",
            claimant_owner=window.owners[0] if window.owners else "",
            claimant_group=window.group or "",
        )
        try:
            await self._ledger.preempt(lease_id, notice)
        except (Refused, Deposed, WriteFailed) as error:
            log.warning("lease %s has no notice yet that its devices are booked: %s", lease_id, error)

    # Answers

    def _status(self, window: Window, now: float) -> WindowStatus:
        known = self._windows.get(window.window_id or "")
        times = self._times[window.window_id or ""] if known is window else occurrences(window)
        left = [time for time in times if time.ends_at > now]
        if not left:
            return WindowStatus(window=window, state=WindowState.OVER)
        devices = list(self._devices(window))
        return WindowStatus(
            window=window,
            state=WindowState.RUNNING if left[0].starts_at <= now else WindowState.BOOKED,
            starts_at=_time(left[0].starts_at),
            ends_at=_time(left[0].ends_at),
            occurrences=len(left),
            hosts=sorted({device.host for device in devices}),
            leases=self._in_the_way(window, devices, left[0]),
            missing=[
                MissingDevice(device=uuid, host=self._host_of(uuid), reason=reason)
                for uuid, reason in self._missing(window, now).items()
            ],
            replaced=self._replaced.get(window.window_id or "", []),
        )

    def _devices(self, window: Window) -> Iterator[Device]:
        """Known devices of a window."""
        fleet = self._fleet
        found = {uuid: fleet.devices[uuid] for uuid in window.devices if uuid in fleet.devices}
        for name in self._hosts(window):
            found.update((device.uuid, device) for device in fleet.hosts[name].devices)
        yield from found.values()

    def _hosts(self, window: Window) -> set[str]:
        """Known hosts that are in maintenance as a whole."""
        if not window.maintenance:
            return set()
        wanted = window.host_labels.items()
        return {
            name
            for name, host in self._fleet.hosts.items()
            if name in window.hosts or any(host.labels.get(key) == value for key, value in wanted)
        }

    def _in_the_way(self, window: Window, devices: Iterable[Device], time: Booking) -> list[WindowLease]:
        """Leases that may reach into a time of a window, and are not in the window."""
        leases: list[WindowLease] = []
        for lease_id, hosts in sorted(self._held(window, devices).items()):
            lease = self._lease(lease_id)
            if lease is None or self._in_own(lease, window) or self._ends_at(lease_id) <= time.starts_at:
                continue
            leases.append(
                WindowLease(
                    lease_id=lease_id,
                    owner=lease.owner,
                    name=lease.name,
                    hosts=sorted(hosts),
                    ends_at=lease.ends_at,
                    preempted=_preempts(window, lease),
                )
            )
        return leases

    def _held(self, window: Window, devices: Iterable[Device]) -> dict[str, set[str]]:
        """Leases that hold something of a window's devices, or of hosts in maintenance, each with these hosts."""
        found: dict[str, set[str]] = {}
        for device in devices:
            for lease_id in device.holders:
                found.setdefault(lease_id, set()).add(device.host)
        for name in self._hosts(window):
            for record in self._ledger.table.on_host(name):
                found.setdefault(record.lease.lease_id, set()).add(name)
        return found

    def _lease(self, lease_id: str) -> Lease | None:
        record = self._ledger.table.get(lease_id)
        return record.lease if record is not None and record.lease.state is LeaseState.ACTIVE else None


def _preempts(window: Window, lease: Lease) -> bool:
    """True if a lease is preempted for a window. Those from before a maintenance was booked go on."""
    before = window.maintenance and (window.booked_at is None or lease.granted_at < window.booked_at)
    return lease.preemptible and not before


def _readable(window: Window) -> bool:
    """True if a stored window has times here; a host may know fewer time zones than the one that booked it."""
    try:
        return bool(occurrences(window))
    except InvalidWindow as error:
        log.error("window %s can't be read, and is dropped: %s", window.window_id, error)
        return False


def in_window(fleet: Fleet, owner: str, grants: Sequence[Grant]) -> bool:
    """True if a device of a decision is booked now, for its owner."""
    if not fleet.bookings:
        return False
    admitted = fleet.bookings.admitted(owner)
    devices = (fleet.devices.get(grant.device) for grant in grants)
    return any(device is not None and device.booked_for in admitted for device in devices)


def lease_limit(
    fleet: Fleet, request: WorkRequest, grants: Sequence[Grant], now: datetime, *, decided_inside: bool
) -> tuple[datetime | None, str]:
    """Time by which a lease must end that is granted now, since its devices are booked, and the window it is in.

    Args:
        fleet: live state.
        request: of the lease.
        grants: its devices.
        now: time of the grant.
        decided_inside: a device was booked for the owner when it was decided on; that window may be over now.

    Returns:
        None for no limit; and empty text for no window.
    """
    if not fleet.bookings:
        return None, ""
    admitted = fleet.bookings.admitted(request.owner)
    until, window = math.inf, ""
    for grant in grants:
        device, host = fleet.devices.get(grant.device), fleet.hosts.get(grant.host)
        bookings = device.bookings if device is not None else host.bookings if host is not None else ()
        at, inside = limit(bookings, now.timestamp(), admitted)
        # One without a limit was decided before the device was booked, and one that is preemptible gets a notice.
        if inside or decided_inside or (request.max_seconds is not None and not request.preemptible):
            until, window = min(until, at), window or inside
    return None if until == math.inf else _time(until), window


def _rejection(
    window: Window, candidates: Sequence[Candidate], wish: Wish, parties: Mapping[str, Party], later: float | None
) -> Rejection:
    """Answer to a window for which there are not enough devices.

    Args:
        window: as asked for.
        candidates: devices that it may have.
        wish: the window.
        parties: whom the windows are for that are booked already.
        later: the soonest begin for which there are enough; None if that is not known.
    """
    unlimited = sum(candidate.free_at == math.inf for candidate in candidates)
    message = (
        f"{len(able(candidates, wish, parties))} of {len(candidates)} devices that match are not booked for others and "
        f"surely free by {time_words(wish.times[0].closes_at)}: the window needs {window.gpus}"
    )
    if later is not None:
        message += f"; there are enough for one that begins at {time_words(later)}"
    elif unlimited:
        message += f"; {unlimited} have leases without max_seconds, which may last any time"
    return Rejection(
        code=RejectionCode.NO_CAPACITY,
        message=message,
        could_ever_fit=len(candidates) >= window.gpus,
        nearest="" if later is None else f"begin at {time_words(later)}",
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _now() -> float:
    return datetime.now(UTC).timestamp()
