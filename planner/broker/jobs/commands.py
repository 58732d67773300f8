"""Jobs as people see them: submitting, listing, and commands about them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec
from msgspec.structs import replace

from ....schemas.operations import QueueFilter
from ....schemas.requests import Error
from ....schemas.work.jobs import (
    Attempt,
    JobAction,
    JobDetails,
    JobFilter,
    Jobs,
    JobSpec,
    JobVerb,
    OverrideAction,
    submitted,
)
from ...durable.store import Store
from ...fleet.fleet import Fleet
from ...jobs import listing
from ...jobs.checks import InvalidJob, check, check_group, number_of_signal, placed_request
from ...jobs.job import Job
from ...jobs.listing import listed
from ...jobs.records import NEXT_ID, StoredJob, job_key, request_id, state_key, task_key
from ...leases.lifecycle import Refused
from ...limits import Limiter
from ...placement.decide import Policies, ask_of
from ...placement.decide import check as check_request
from ...placement.reject import could_ever_fit
from ..operator_changes import refusals
from ..pending import Responder
from .broker import JobBroker
from .records import ID_BLOCK, encoded

log = logging.getLogger("corral.planner.broker.jobs.broker")

MAX_PART: Final = 1 / 4
"""Part of the bucket that jobs may take, so that leases have the rest."""
_encode_canonical: Final = msgspec.json.Encoder(order="deterministic").encode


class JobCommands:
    """Submits, lists and changes the jobs of a term.

    Args:
        jobs: of the term.
        fleet: live state.
        store: the bucket.
        policies: of this planner.
        limiter: quotas of owners.
        group_of: returns the group of an owner.
        explain: brings the reasons why requests wait up to date.
        why_waiting: returns why a request, named by owner and id, waits; empty if it does not.
        max_bytes: size limit of a listing.
        next_id: first job id that is not reserved.
        deposed: called when a write was refused since another planner leads.
    """

    def __init__(
        self,
        jobs: JobBroker,
        fleet: Fleet,
        store: Store,
        policies: Policies,
        limiter: Limiter,
        group_of: Callable[[str], str],
        explain: Callable[[QueueFilter], None],
        why_waiting: Callable[[str, str], str],
        max_bytes: int,
        next_id: int,
        deposed: Callable[[], None],
    ) -> None:
        self._jobs = jobs
        self._table = jobs.table
        self._fleet = fleet
        self._store = store
        self._policies = policies
        self._limiter = limiter
        self._group_of = group_of
        self._explain = explain
        self._why_waiting = why_waiting
        self._max_bytes = max_bytes
        self._next_id = self._reserved = next_id
        self._deposed = deposed
        self._submitting: dict[tuple[str, str], asyncio.Lock] = {}
        self._reserving = asyncio.Lock()

    # Submitting

    async def submit(self, spec: JobSpec, caller: Responder) -> None:
        """Queue a job, durably, and answer with it. Idempotent by its `submit_id`."""
        async with refusals(spec, caller, self._deposed):
            try:
                if spec.submit_id is None:
                    job = await self._submit(spec, "")
                else:
                    key = spec.request.owner, spec.submit_id
                    lock = self._submitting.setdefault(key, asyncio.Lock())
                    async with lock:
                        job = await self._submit_once(spec, key)
                    self._submitting.pop(key, None)
            except InvalidJob as error:
                await caller.answer(Error(code=error.code, message=str(error), field=error.field))
                return
            ungrouped = f"There are no groups: the job is not charged to {spec.group!r}"
            warnings = [ungrouped] if spec.group and not job.stored.group else []
            await caller.answer(replace(listed(job), warnings=warnings))
            self._jobs.carry_out()

    async def _submit_once(self, spec: JobSpec, key: tuple[str, str]) -> Job:
        digest = hashlib.blake2b(_encode_canonical(spec), digest_size=12).hexdigest()
        known = self._table.jobs.get(self._table.submits.get(key, ""))
        if known is None:
            return await self._submit(spec, digest)
        if known.stored.digest != digest:
            text = f"submit_id {spec.submit_id!r} was used for another job ({known.job_id}): give each one of its own"
            raise InvalidJob(text, "$.submit_id", "conflict")
        return known

    async def _submit(self, spec: JobSpec, digest: str) -> Job:
        check(spec)
        owner = spec.request.owner
        group = self._group_of(owner)
        check_group(spec.group, owner, group)
        self._check_possible(spec)
        self._table.check_dependencies(spec.after)
        job_id = await self._new_id()
        now = time.time()
        stored = StoredJob(
            job_id=job_id,
            spec=submitted(spec),
            submitted_at=now,
            group=group,
            digest=digest,
        )
        value = encoded(stored)
        refused = self._limiter.job_quota(owner, self._table.active[owner], self._table.bytes + len(value), self._most)
        if refused is not None or not self._store.has_room:
            raise Refused.by(refused or Error(code="unavailable", message="The planner's bucket is nearly full"))
        if len(value) > self._store.max_record_bytes:
            raise InvalidJob(f"The job takes {len(value)} bytes, more than a record may", "$.script", "too_large")
        await self._jobs.records.put(job_key(job_id), value, once=True)
        return self._table.submit(stored, len(value), now)

    @property
    def _most(self) -> int:
        return int(self._store.max_bytes * MAX_PART) if self._store.max_bytes > 0 else 2**40

    def _check_possible(self, spec: JobSpec) -> None:
        """Check that the fleet could ever hold a task, were it idle and had runners.

        Raises:
            InvalidJob: it could not.
            InvalidRequest: the request contradicts itself.
        """
        request = placed_request(spec)
        check_request(self._fleet, request, self._policies)
        if request.devices:
            self._check_named(spec)
            return
        if self._fleet.hosts and not could_ever_fit(self._fleet, ask_of(self._fleet, request)):
            text = "This fleet could not hold a task of the job even when idle: `corral explain` says why"
            raise InvalidJob(text, "$.request", "impossible")

    def _check_named(self, spec: JobSpec) -> None:
        """Check that the devices that a job names are there, and on as many hosts as it says."""
        if not self._fleet.hosts:
            return
        known = [self._fleet.devices.get(uuid) for uuid in spec.request.devices]
        if missing := [uuid for uuid, device in zip(spec.request.devices, known, strict=True) if device is None]:
            raise InvalidJob(f"There is no device {missing[0]}", "$.request.devices", "impossible")
        hosts = len({device.host for device in known if device is not None})
        if hosts != spec.hosts:
            text = f"The named devices are on {hosts} hosts, and hosts is {spec.hosts}: set it to their number"
            raise InvalidJob(text, "$.hosts")

    async def _new_id(self) -> str:
        """New id of a job; they are reserved in blocks, durably."""
        async with self._reserving:
            if self._next_id >= self._reserved:
                await self._jobs.records.put(NEXT_ID, str(self._next_id + ID_BLOCK).encode())
                self._reserved = self._next_id + ID_BLOCK
            self._next_id += 1
            return str(self._next_id - 1)

    # Listing

    def list(self, only: JobFilter) -> Jobs:
        """List jobs, the newest first, cut at the size of a message."""
        self._explain(QueueFilter(owner=only.owner))
        return listing.listing(self._table.jobs.values(), only, self._max_bytes, self._why)

    def cost(self, only: JobFilter) -> float:
        """Cost of a listing, in seconds."""
        jobs = self._table.jobs
        chosen = [jobs[job_id] for job_id in only.job_ids if job_id in jobs] if only.job_ids else jobs.values()
        tasks = sum(len(job.indexes) for job in chosen) if only.tasks else 0
        return listing.cost(len(jobs), tasks, only)

    def _why(self, job: Job) -> str:
        """Reason why a job waits that is neither held nor waits for others."""
        if job.live or job.ended_at is not None:
            return ""
        if self._fleet.runners:
            return self._why_first(job)
        unready = next(iter(self._fleet.unready_runners.items()), None)
        return "no host has a runner" if unready is None else f"no runner starts jobs: {': '.join(unready)}"

    def _why_first(self, job: Job) -> str:
        """Return why no task of a job starts: the reason of the first in the queue, as all ask for the same."""
        if job.stored.spec.request.devices:
            return self._jobs.why_not.get(job.job_id, "")
        if not job.in_line:
            return ""
        index = min(job.in_line)
        attempt = Attempt(job.job_id, index, job.view(index).attempt + 1)
        return self._why_waiting(job.owner, request_id(attempt))

    # Commands

    async def act(self, action: JobAction, caller: Responder) -> None:
        """Carry out a command of the owner of a job, and answer once it is durable."""
        async with refusals(action, caller, self._deposed):
            await self._answer(action, action.owner, "", caller)

    async def override(self, action: OverrideAction, caller: Responder) -> None:
        """Carry out an operator's command about a job of anybody."""
        async with refusals(action, caller, self._deposed):
            await self._answer(action.action, None, action.operator, caller)

    async def _answer(self, action: JobAction, owner: str | None, operator: str, caller: Responder) -> None:
        try:
            await caller.answer(await self._act(action, owner, operator))
        except InvalidJob as error:
            await caller.answer(Error(code=error.code, message=str(error), field=error.field))

    async def _act(self, action: JobAction, owner: str | None, operator: str) -> JobDetails:
        job = self._table.jobs.get(action.job_id)
        if job is None:
            text = f"There is no job {action.job_id}: it never was, or it ended long ago"
            raise InvalidJob(text, "$.job_id", "not_found")
        if not operator and owner is None:
            raise InvalidJob("Say who asks: owner is missing", "$.owner")
        if owner is not None and owner != job.owner:
            raise InvalidJob(f"Job {job.job_id} is not {owner!r}'s: only its owner may do this", "$.owner", "not_owner")
        if action.verb is JobVerb.SHOW:
            return JobDetails(job=listed(job), spec=job.stored.spec)
        for index in action.indexes:
            if not job.has(index):
                raise InvalidJob(f"Job {job.job_id} has no task {index}", "$.indexes", "not_found")
        before = set(self._table.changes.tasks)
        changed = self._change(job, action, operator)
        keys = [task_key(*key) for key in self._table.changes.tasks if key not in before and key[0] == job.job_id]
        self._jobs.carry_out()
        await self._jobs.records.saved([state_key(job.job_id), *keys])
        return JobDetails(job=listed(job), changed=changed)

    def _change(self, job: Job, action: JobAction, operator: str) -> int:
        now = time.time()
        if action.verb is JobVerb.CANCEL:
            number = number_of_signal(action.signal, "$.signal") if action.signal else 0
            by = f"cancelled by {operator or job.owner}"
            return self._table.cancel(
                job, action.indexes, f"{by}: {action.reason}" if action.reason else by, number, now
            )
        if action.verb is JobVerb.HOLD:
            return self._table.hold(job, action.indexes)
        if action.verb is JobVerb.RELEASE:
            return self._table.unhold(job, action.indexes)
        return self._table.resubmit(job, action.indexes, now)
