"""The asynchronous client of a fleet."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import msgspec
import nats.aio.client
import nats.errors
from msgspec.structs import replace

from ..bus.connect import BusUnavailable
from ..bus.connect import connect as bus_connect
from ..schemas import codec, operations, requests, subjects
from ..schemas.metrics import DeviceSample
from ..schemas.models.description import ModelDescription
from ..schemas.models.serving import ServeFit, ServeWork
from ..schemas.query import MAX_ROWS, CancelRequest, ProcessorStatus, QueryRequest, ResultFormat
from ..schemas.subjects import PlanSubject
from ..schemas.work.groups import Group, GroupChange, GroupFilter, Groups, GroupTree
from ..schemas.work.moves import Moves, MovesQuery
from ..schemas.work.windows import Window, WindowAction, WindowFilter, Windows, WindowStatus
from . import subscriptions
from .config import resolve_connection
from .errors import NoService, QueryFailed, Refused, Rejected, Unavailable
from .jobs.calls import JobCalls
from .leases.child_processes import CHILDREN_GRACE_SECONDS
from .leases.context import LeaseContext
from .leases.environment import restricted_to_host
from .leases.lease import Lost, Noticed, OnOutage, Resizing
from .measured.find import with_measured_rates
from .notebook import DeviceList
from .notifications import NotifyCalls
from .paging import all_devices, all_queued
from .query import collect, user_subject
from .request import OWNER_VARIABLE, RequestFields, refuse_not_finite, work_request
from .request_calls import RequestCalls
from .result import QueryResult
from .rpc import RETRY_SECONDS, Waiting
from .serving import ServeFields, serve_distribution, serve_work

_log = logging.getLogger("corral.client")


class Client(RequestCalls):
    """A connection to a fleet. It reconnects automatically; calls made during an outage wait until their timeout.

    Args:
        nc: a connected client of the bus.
        owner: owner of requests and leases where a call names none. Defaults to `CORRAL_OWNER`, then the owner that
            the credentials name, then the name of the user account.
        timeout: seconds to wait for an answer.
        patience: seconds to keep retrying while a service is absent (during a restart, for example).
        owned_subjects: send requests on subjects that end with the owner, as a bus with authentication requires.
            Defaults to true if the connection has credentials.
    """

    def __init__(
        self,
        nc: nats.aio.client.Client,
        *,
        owner: str | None = None,
        timeout: float = 10.0,
        patience: float = 2.0,
        owned_subjects: bool | None = None,
    ) -> None:
        super().__init__(nc, owner=owner, timeout=timeout, patience=patience, owned_subjects=owned_subjects)
        self._person = ""

    @property
    def jobs(self) -> JobCalls:
        """Calls about jobs: `await client.jobs.submit(["python", "train.py"], gpus=2)`."""
        return JobCalls(
            self.nc,
            owner=self.owner,
            timeout=self.timeout,
            patience=self.patience,
            owned_subjects=self.owned_subjects,
        )

    @property
    def notifications(self) -> NotifyCalls:
        """Calls about rules for notifications: `await client.notifications.rules()`."""
        return NotifyCalls(
            self.nc,
            owner=self.owner,
            timeout=self.timeout,
            patience=self.patience,
            owned_subjects=self.owned_subjects,
        )

    def speaking_for(self, person: str) -> Self:
        """A client on the same connection whose queries and explanations are queued under the name of `person`.

        For services with several users, such as the dashboard: a user with many queries then delays only themselves.
        The bus allows this to service users only (`corral auth add … --service`).
        """
        made = copy.copy(self)
        made._person = person
        return made

    def lease(
        self,
        *,
        on_lost: Lost | None = None,
        on_preempt: Noticed | None = None,
        on_resize: Resizing | None = None,
        on_wait: Waiting | None = None,
        set_environment: bool = False,
        on_outage: OnOutage | str = OnOutage.CONTINUE,
        children_grace: float = CHILDREN_GRACE_SECONDS,
        **fields: Unpack[RequestFields],
    ) -> LeaseContext:
        """Hold a lease for the length of a block: requested on entry, renewed in the background, released on exit.

        `async with client.lease(gpus=2, memory="20GiB") as lease: …`

        Args:
            on_lost: called with the `LeaseLost` if the lease ends too early. Without it, the block is cancelled and
                raises the `LeaseLost`.
            on_preempt: called with the `Preemption` when the lease will be preempted; it may be a coroutine function.
                `lease.saved()` ends the lease at once, `lease.busy(seconds)` puts its end off.
            on_resize: called with the `Resize` when an elastic lease may grow or shrink, likewise. The answer is
                `lease.accept_resize()` or `lease.decline_resize()`. Without it every such notice is declined.
            on_wait: as in `request`.
            set_environment: set `CUDA_VISIBLE_DEVICES`, the equivalent variables of other runtimes and `CORRAL_LEASE`
                in this process for the block. Only GPUs of this host are requested, unless `hosts` names others
                (`"any"` for all hosts).
            on_outage: what to do while bus or planner can't be reached. `continue` goes on until a planner reports
                that the lease has ended; `stop` gives the lease up once it was not renewed within its time to live.
            children_grace: seconds to wait at the end of the block, with the lease still held, for processes that the
                block has started. They are named in the log; those that still run afterwards, in a
                `ResourceWarning`. 0 releases at once.
            fields: as in `request`.
        """
        return LeaseContext(
            self,
            work_request(self.owner, restricted_to_host(fields) if set_environment else fields),
            on_lost=on_lost,
            on_preempt=on_preempt,
            on_resize=on_resize,
            on_wait=on_wait,
            set_environment=set_environment,
            on_outage=on_outage,
            children_grace=children_grace,
        )

    async def explain(
        self, *, with_more: Sequence[operations.Addition] = (), **fields: Unpack[RequestFields]
    ) -> operations.Explanation:
        """Predict the outcome of a request without granting it.

        Args:
            with_more: devices to add to the fleet, for this prediction only.
            fields: as in `request`.

        Raises:
            InvalidRequest: a field is wrong.
            Unavailable, NoService, TimedOut: no planner answered.
        """
        body = operations.ExplainRequest(request=work_request(self.owner, fields), with_more=list(with_more))
        if self._person:
            # A server that was set up by an earlier version refuses subjects that name a person behind a service.
            with contextlib.suppress(Refused):
                subject = user_subject(self.nc, PlanSubject.EXPLAIN, self._person)
                return await self._plan(subject, body, operations.Explanation)
        subject = user_subject(self.nc, PlanSubject.EXPLAIN) if self.owned_subjects else PlanSubject.EXPLAIN
        return await self._plan(subject, body, operations.Explanation)

    async def fit(
        self,
        model: ModelDescription | str | Path,
        *,
        with_more: Sequence[operations.Addition] = (),
        serve: ServeFields | None = None,
        measured: bool = True,
        **fields: Unpack[RequestFields],
    ) -> ServeFit:
        """Find out whether the free devices can serve a model, how to split it, and what throughput to expect.

        Nothing is leased: `request(devices=[...])` leases the devices of a plan. Each plan says what its figures rest
        on.

        Args:
            model: its description, or a path: a folder with `config.json`, safetensors or GGUF files, or one of these.
            with_more: devices to add to the fleet, for this question only.
            serve: context length, sequences and limits; see `ServeFields`.
            measured: use the rates that the owner's jobs have measured for this model, and those of AIConfigurator's
                tables if they are installed, behind those of a profile. Where jobs can't be read, they are left out
                with a warning in the log.
            fields: limits on the devices, as in `request`.

        Raises:
            InvalidRequest: the model can't be read, or a field is wrong.
            Unavailable, NoService, TimedOut: no planner answered.
        """
        work = serve_work(model, serve or {})
        if measured:
            work, problem = await with_measured_rates(self, work, fields.get("owner"))
            if problem:
                _log.warning("%s", problem)
        return await self.fit_work(work, with_more=with_more, **fields)

    async def fit_work(
        self, work: ServeWork, *, with_more: Sequence[operations.Addition] = (), **fields: Unpack[RequestFields]
    ) -> ServeFit:
        """Find out whether the free devices can serve a model, with the rates that `work` has; otherwise as `fit`."""
        asked: RequestFields = {**fields, "distribution": serve_distribution(work)}
        found = (await self.explain(with_more=with_more, **asked)).fit
        if found is None:
            raise NoService("this planner is of an earlier version, and does not plan to serve models")
        return found

    # The fleet

    async def devices(
        self, *, hosts: Sequence[str] = (), models: Sequence[str] = (), devices: Sequence[str] = ()
    ) -> DeviceList:
        """Devices as the planner sees them now, sorted by host and index; each argument is a list of globs."""

        async def ask(wanted: operations.DeviceFilter) -> operations.Devices:
            return await self._plan(PlanSubject.DEVICES, wanted, operations.Devices)

        return DeviceList(await all_devices(ask, _filter(hosts, models, devices)))

    async def fleet(
        self, *, hosts: Sequence[str] = (), models: Sequence[str] = (), devices: Sequence[str] = ()
    ) -> operations.FleetSummary:
        """Aggregates over the fleet, or over the devices that match the globs."""
        return await self._plan(PlanSubject.FLEET, _filter(hosts, models, devices), operations.FleetSummary)

    async def queue(self, *, owner: str | None = None) -> list[operations.QueueEntry]:
        """Requests in the queue, in queue order; only those of `owner`, if given."""

        async def ask(wanted: operations.QueueFilter) -> operations.Queue:
            return await self._plan(PlanSubject.QUEUE, wanted, operations.Queue)

        entries = await all_queued(ask, operations.QueueFilter(owner=owner))
        return [entry for entry in entries if owner in (None, entry.owner)]  # an earlier planner lists all owners

    async def drain(
        self,
        *,
        reason: str,
        devices: Sequence[str] = (),
        hosts: Sequence[str] = (),
        host_labels: dict[str, str] | None = None,
        operator: str | None = None,
    ) -> dict[str, str]:
        """Keep new work off devices or hosts; existing leases continue.

        Returns:
            All drains that are now in effect, with their reasons.
        """
        action = operations.DrainAction(
            drain=True,
            devices=list(devices),
            hosts=list(hosts),
            host_labels=host_labels or {},
            reason=reason,
            operator=self._operator(operator),
        )
        return (await self._plan(self._signed(PlanSubject.DRAIN, action), action, operations.Drains)).drains

    async def undrain(
        self,
        *,
        devices: Sequence[str] = (),
        hosts: Sequence[str] = (),
        host_labels: dict[str, str] | None = None,
        operator: str | None = None,
    ) -> dict[str, str]:
        """Allow new work on drained devices or hosts again. Returns the drains that remain in effect."""
        action = operations.DrainAction(
            drain=False,
            devices=list(devices),
            hosts=list(hosts),
            host_labels=host_labels or {},
            operator=self._operator(operator),
        )
        return (await self._plan(self._signed(PlanSubject.DRAIN, action), action, operations.Drains)).drains

    async def book(self, window: Window, *, dry_run: bool = False, operator: str | None = None) -> WindowStatus:
        """Book devices for a time, once or repeatedly; or maintenance, with nobody on them.

        Args:
            window: the window. Without a `window_id` it is given one, so that it is booked once if it is sent twice.
            dry_run: only say which devices it would get.
            operator: name of the operator; as for `drain`.

        Returns:
            The window with its devices, and the leases that may reach into it.

        Raises:
            Rejected: there are not enough devices that are free by then; its message says when there are.
            InvalidRequest: the window contradicts itself; `field` says where.
        """
        if window.window_id is None:
            window = replace(window, window_id=uuid.uuid4().hex[:8])
        return await self._change_window(WindowAction(book=window, dry_run=dry_run, operator=self._operator(operator)))

    async def cancel_window(self, window_id: str, *, operator: str | None = None) -> WindowStatus:
        """Cancel a booked window, all of its occurrences. Leases in it go on until it would have ended."""
        return await self._change_window(WindowAction(cancel=window_id, operator=self._operator(operator)))

    async def windows(self, *, owner: str | None = None, window_id: str | None = None) -> list[WindowStatus]:
        """Booked windows, soonest first; only those that are for `owner`, if given."""
        only = WindowFilter(owner=owner, window_id=window_id)
        return (await self._plan(PlanSubject.WINDOWS, only, Windows)).windows

    async def _change_window(self, action: WindowAction) -> WindowStatus:
        expected: Any = Windows | requests.Rejection
        answer: Windows | requests.Rejection = await self._plan(
            self._signed(PlanSubject.BOOK, action), action, expected
        )
        if isinstance(answer, requests.Rejection):
            raise Rejected(answer)
        return answer.windows[0]

    async def evict(self, lease_id: str, *, reason: str, operator: str | None = None) -> requests.Lease:
        """Evict a lease: take it back from its owner, who is told the reason."""
        action = operations.EvictAction(lease_id=lease_id, reason=reason, operator=self._operator(operator))
        return await self._plan(self._signed(PlanSubject.EVICT, action), action, requests.Lease)

    async def groups(self, *, name: str | None = None) -> Groups:
        """Groups that share the fleet, with their state; only the group `name` and those within, if given."""
        return await self._plan(PlanSubject.GROUPS, GroupFilter(name=name), Groups)

    async def set_groups(
        self,
        *groups: Group,
        delete: Sequence[str] = (),
        replace: GroupTree | None = None,
        revision: int | None = None,
        dry_run: bool = False,
        operator: str | None = None,
    ) -> Groups:
        """Change the groups: replace the tree, if one is given, then delete groups, then set others.

        Args:
            groups: groups to add, or to change as a whole.
            delete: names of groups to delete, with those within.
            replace: the tree in place of all that is there.
            revision: revision of the tree that the change was decided on; None for any.
            dry_run: return what would result, and change nothing.
            operator: name that signs the change.

        Returns:
            All groups after the change. Its warnings name guarantees of more than the fleet has at present.

        Raises:
            InvalidRequest: the tree would contradict itself; `field` is the path of the field at fault.
            Conflict: the tree has another revision.
            Refused: the credentials' user is no operator.
        """
        change = GroupChange(
            replace=replace,
            set=list(groups),
            delete=list(delete),
            revision=revision,
            dry_run=dry_run,
            operator=self._operator(operator),
        )
        refuse_not_finite(msgspec.to_builtins(change))
        return await self._plan(self._signed(PlanSubject.SET_GROUPS, change), change, Groups)

    async def preempt(
        self, lease_id: str, *, reason: str, devices: Sequence[str] = (), operator: str | None = None
    ) -> requests.Lease:
        """Preempt a preemptible lease: its holder gets a notice with the reason, and it ends after its grace.

        Args:
            lease_id: id of the lease.
            reason: why, for its holder.
            devices: of an elastic lease, preemptible or not: uuids of devices that its holder is asked to give back
                instead, within its grace. It keeps them if its holder does not agree.
            operator: name of the operator.

        Returns:
            The lease, whose `preemption` says when it ends, or whose `resize` says what was asked.

        Raises:
            Refused: the lease is not preemptible, or has not lasted for its `min_run_seconds` yet; or it is not
                elastic, or can't do without these devices.
            NotFound: there is no such lease; its subclass `Ended`, if the lease has ended.
        """
        action = operations.PreemptAction(
            lease_id=lease_id, reason=reason, operator=self._operator(operator), devices=list(devices)
        )
        return await self._plan(self._signed(PlanSubject.PREEMPT, action), action, requests.Lease)

    async def moves(
        self,
        *,
        free_hosts: int | None = None,
        hosts: Sequence[str] = (),
        models: Sequence[str] = (),
        request_id: str | None = None,
        owner: str | None = None,
    ) -> Moves:
        """The fewest leases to preempt, or to shrink, so that hosts become free, or a request can start.

        Nothing is changed: `preempt` each of the leases to carry it out, with the `devices` that it `gives_back`.

        Args:
            free_hosts: number of hosts that shall be free of leases; else it is about a request.
            hosts: globs over the names of these hosts.
            models: globs over the names of their devices.
            request_id: id of the request; the one that is next in the queue by default.
            owner: owner of the request, where several use the id.

        Raises:
            NotFound: no such request waits.
        """
        query = MovesQuery(
            free_hosts=free_hosts, hosts=list(hosts), models=list(models), request_id=request_id, owner=owner
        )
        return await self._plan(PlanSubject.MOVES, query, Moves)

    # History

    async def query(
        self,
        sql: str,
        *,
        limit: int | None = None,
        timeout: float = 30.0,
        format: ResultFormat | str | None = None,
        query_id: str | None = None,
    ) -> QueryResult:
        """Run one read-only SQL statement over the history.

        If the caller is cancelled, the statement is cancelled too.

        Args:
            sql: a SELECT, WITH, FROM, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN statement.
            limit: maximum number of rows; `truncated` of the result is true if there were more. All rows by default.
            timeout: seconds after which the statement is stopped.
            format: format of the answer. Defaults to Arrow if pyarrow is installed, else to JSON.
            query_id: id of the query for `cancel`; generated by default.

        Raises:
            QueryFailed: the database or its guard refused the statement; or the result has more rows than an answer
                can hold, and no `limit` was given.
            TimedOut: the statement took too long.
            NoService: no processor answered.
        """
        if format is None:
            format = ResultFormat.ARROW if find_spec("pyarrow") else ResultFormat.JSON
        request = QueryRequest(
            sql=sql,
            format=ResultFormat(format),
            limit=MAX_ROWS if limit is None else limit,
            timeout_seconds=timeout,
            query_id=query_id or uuid.uuid4().hex,
            window=8,
        )
        for attempt in self._patiently():
            try:
                result = await collect(self.nc, request, margin_seconds=self.timeout, person=self._person)
                if result.truncated and limit is None:
                    raise QueryFailed(
                        f"there are more than {MAX_ROWS:,} rows, the maximum of one answer: select fewer, "
                        "or set `limit` if the first rows are enough",
                        "too_large",
                    )
                return result
            except NoService:
                if not attempt():
                    raise
                await asyncio.sleep(RETRY_SECONDS)
            except nats.errors.Error as error:
                raise self._bus_error(error, subjects.QUERY) from error
        raise AssertionError("unreachable")

    async def cancel(self, query_id: str) -> None:
        """Cancel a query that is running or queued."""
        await self._call(subjects.QUERY_CANCEL, CancelRequest(query_id=query_id))

    async def history(self) -> ProcessorStatus:
        """Status of the history: the processor's lag behind the bus, and its state."""
        return codec.decode(await self._call(subjects.HISTORY_STATUS, None), ProcessorStatus, codec.JSON)

    # Live

    def watch(self, *, hosts: Sequence[str] = (), devices: Sequence[str] = ()) -> AsyncIterator[DeviceSample]:
        """Stream samples from now on; of the whole fleet if neither hosts nor devices are given (lists of globs).

        A slow consumer loses samples, but keeps its connection.
        """
        return subscriptions.samples(self.nc, hosts, devices)

    def _signed(
        self,
        subject: str,
        action: operations.DrainAction | operations.EvictAction | operations.PreemptAction | GroupChange | WindowAction,
    ) -> str:
        return self._signed_by(subject, action.operator)


class Connecting:
    """Result of `connect`: await it for a client, or enter it with `async with`, which closes the client at the end."""

    def __init__(self, start: Callable[[], Awaitable[Client]]) -> None:
        self._start = start
        self._client: Client | None = None

    def __await__(self) -> Generator[Any, None, Client]:
        return self._start().__await__()

    async def __aenter__(self) -> Client:
        self._client = await self._start()
        return self._client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()


def connect(
    url: str | None = None,
    *,
    owner: str | None = None,
    credentials: str | None = None,
    context: str | None = None,
    timeout: float = 10.0,
    patience: float = 2.0,
    wait: float | None = 5.0,
    name: str = "corral-client",
    **options: Any,
) -> Connecting:
    """Connect to a fleet: `client = await connect()`, or `async with connect() as client:`.

    Args:
        url: URL of the bus. Defaults to `CORRAL_NATS_URL`, then to the context in use, then to the local default.
        owner: owner of requests and leases. Defaults to `CORRAL_OWNER`, then to the context's owner, then to the
            credentials' owner, then to the name of the user account.
        credentials: path of a credentials file. Defaults to `CORRAL_NATS_CREDS`, then to the credentials of the
            context with that URL.
        context: name of a context that `corral context add` or `corral up` has written. It takes precedence over the
            environment.
        timeout: seconds to wait for an answer.
        patience: seconds to keep retrying while a service is absent.
        wait: seconds to wait for the bus at the start; None retries forever.
        name: name of the connection in the server's list of connections.
        options: further options of `bus.connect`, such as `ca`, and of `nats.connect`.

    Raises:
        Unavailable: no server answered; the message says what to do.
    """

    async def start() -> Client:
        settings, named = resolve_connection(url, credentials, context)
        try:
            everything: dict[str, Any] = {**settings, **options}
            nc = await bus_connect(name=name, wait_seconds=wait, **everything)
        except BusUnavailable as error:
            raise Unavailable(str(error)) from error
        if not context and os.environ.get(OWNER_VARIABLE):
            named = ""
        return Client(nc, owner=owner or named or None, timeout=timeout, patience=patience)

    return Connecting(start)


def _filter(hosts: Sequence[str], models: Sequence[str], devices: Sequence[str]) -> operations.DeviceFilter:
    return operations.DeviceFilter(hosts=list(hosts), models=list(models), devices=list(devices))
