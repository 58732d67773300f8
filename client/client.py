"""The asynchronous client: every method is one subject of the bus."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self, Unpack

import msgspec
import nats.aio.client
import nats.errors

from ..bus.connect import BusUnavailable
from ..bus.connect import connect as bus_connect
from ..bus.credentials import ANY_OWNER
from ..schemas import codec, operations, requests, subjects
from ..schemas.metrics import DeviceSample
from ..schemas.query import MOST_ROWS, CancelRequest, ProcessorStatus, QueryRequest, ResultFormat
from ..schemas.subjects import PlanSubject
from . import subscriptions
from .contexts import way
from .environment import placed_here
from .errors import InvalidRequest, NoService, QueryFailed, Refused, Unavailable
from .lease import LeaseContext, Lost, OnOutage
from .leftovers import CHILDREN_GRACE_SECONDS
from .notebook import DeviceList
from .paging import all_devices
from .query import collect, in_own_name
from .request import OWNER_VARIABLE, RequestFields, work_request
from .request_calls import RequestCalls
from .result import QueryResult
from .rpc import RETRY_SECONDS, Waiting


class Client(RequestCalls):
    """A connection to a fleet. It reconnects by itself; a call in the meantime waits until its timeout.

    Args:
        nc: a connected client of the bus.
        owner: who asks where a call does not say; `CORRAL_OWNER`, then the credentials' owner, then the account's name.
        timeout: seconds to wait for an answer.
        patience: seconds to wait for a service that is not there (one that restarts, say).
        owned_subjects: ask on the subjects that end on the owner, as a bus with authentication wants it; by default
            where the connection has credentials.
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

    def speaking_for(self, person: str) -> Self:
        """A client of the same connection that asks the history, and for explanations, in turns of somebody else.

        For services that several people use, as the dashboard: one of them then holds up nobody but themselves. The bus
        lets services do so alone (`corral auth add … --service`).
        """
        made = copy.copy(self)
        made._person = person
        return made

    def lease(
        self,
        *,
        on_lost: Lost | None = None,
        on_wait: Waiting | None = None,
        set_environment: bool = False,
        on_outage: OnOutage | str = OnOutage.CONTINUE,
        children_grace: float = CHILDREN_GRACE_SECONDS,
        **fields: Unpack[RequestFields],
    ) -> LeaseContext:
        """Devices for the length of a block: asked for on entry, renewed meanwhile, released at the end.

        `async with client.lease(gpus=2, memory="20GiB") as lease: …`

        Args:
            on_lost: called with the `LeaseLost` if the lease ends too early; without it the block is cancelled and
                the `LeaseLost` raised from it.
            on_wait: as in `request`.
            set_environment: set `CUDA_VISIBLE_DEVICES`, its like and `CORRAL_LEASE` in this process for the block.
                GPUs of this host are taken unless `hosts` says otherwise (`"any"` for all).
            on_outage: `continue`, where bus and planner can't be reached, until a planner says that the lease has
                ended; or `stop`, once the lease could not be renewed in its time.
            children_grace: what the block has started and left is waited for so many seconds at its end, with the
                lease held, and named in the log; what is there still then, in a `ResourceWarning`. 0 releases at once.
            fields: as in `request`.
        """
        return LeaseContext(
            self,
            work_request(self.owner, placed_here(fields) if set_environment else fields),
            on_lost=on_lost,
            on_wait=on_wait,
            set_environment=set_environment,
            on_outage=on_outage,
            children_grace=children_grace,
        )

    async def explain(
        self, *, with_more: Sequence[operations.Addition] = (), **fields: Unpack[RequestFields]
    ) -> operations.Explanation:
        """What would become of a request, without granting it; with devices added first, if given."""
        body = operations.ExplainRequest(request=work_request(self.owner, fields), with_more=list(with_more))
        if self._person:
            # A server of an earlier version knows nobody behind whom it knows.
            with contextlib.suppress(Refused):
                subject = in_own_name(self.nc, PlanSubject.EXPLAIN, self._person)
                return await self._plan(subject, body, operations.Explanation)
        subject = in_own_name(self.nc, PlanSubject.EXPLAIN) if self.owned_subjects else PlanSubject.EXPLAIN
        return await self._plan(subject, body, operations.Explanation)

    # The fleet

    async def devices(
        self, *, hosts: Sequence[str] = (), models: Sequence[str] = (), devices: Sequence[str] = ()
    ) -> DeviceList:
        """Devices as the planner sees them now, by host and index; each argument is a list of globs."""

        async def ask(wanted: operations.DeviceFilter) -> operations.Devices:
            return await self._plan(PlanSubject.DEVICES, wanted, operations.Devices)

        return DeviceList(await all_devices(ask, _filter(hosts, models, devices)))

    async def fleet(
        self, *, hosts: Sequence[str] = (), models: Sequence[str] = (), devices: Sequence[str] = ()
    ) -> operations.FleetSummary:
        """Aggregates over the fleet, or over the part that the globs name."""
        return await self._plan(PlanSubject.FLEET, _filter(hosts, models, devices), operations.FleetSummary)

    async def queue(self, *, owner: str | None = None) -> list[operations.QueueEntry]:
        """The requests that wait, first in line first; only of an owner, if one is given."""
        found: list[operations.QueueEntry] = []
        while True:
            only = operations.QueueFilter(owner=owner, offset=len(found))
            part = await self._plan(PlanSubject.QUEUE, only, operations.Queue)
            found += part.entries
            if len(found) >= part.total or not part.entries:  # a planner that lists all at once names no total
                return [entry for entry in found if owner in (None, entry.owner)]

    async def drain(
        self,
        *,
        reason: str,
        devices: Sequence[str] = (),
        hosts: Sequence[str] = (),
        host_labels: dict[str, str] | None = None,
        operator: str | None = None,
    ) -> dict[str, str]:
        """Keep new work off devices or hosts; leases that are there go on.

        Returns:
            All drains that hold now, with their reasons.
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
        """Let work on again. Returns the drains that still hold."""
        action = operations.DrainAction(
            drain=False,
            devices=list(devices),
            hosts=list(hosts),
            host_labels=host_labels or {},
            operator=self._operator(operator),
        )
        return (await self._plan(self._signed(PlanSubject.DRAIN, action), action, operations.Drains)).drains

    async def evict(self, lease_id: str, *, reason: str, operator: str | None = None) -> requests.Lease:
        """Take a lease back from its owner, who is told the reason."""
        action = operations.EvictAction(lease_id=lease_id, reason=reason, operator=self._operator(operator))
        return await self._plan(self._signed(PlanSubject.EVICT, action), action, requests.Lease)

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
        """The result of one read-only SQL statement over the history.

        A caller that is cancelled cancels the statement too.

        Args:
            sql: a SELECT, WITH, FROM, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN.
            limit: at most so many rows; `truncated` says whether there were more. All rows by default.
            timeout: seconds, then the statement is stopped.
            format: Arrow where pyarrow is installed, else JSON.
            query_id: names the query for `cancel`; one is made up by default.

        Raises:
            QueryFailed: what the database or its guard said; or there are more rows than an answer can have, and no
                `limit` says that the first ones are enough.
            TimedOut: it took too long.
        """
        if format is None:
            format = ResultFormat.ARROW if find_spec("pyarrow") else ResultFormat.JSON
        request = QueryRequest(
            sql=sql,
            format=ResultFormat(format),
            limit=MOST_ROWS if limit is None else limit,
            timeout_seconds=timeout,
            query_id=query_id or uuid.uuid4().hex,
            window=8,
        )
        for attempt in self._patiently():
            try:
                result = await collect(self.nc, request, margin_seconds=self.timeout, person=self._person)
                if result.truncated and limit is None:
                    raise QueryFailed(
                        f"there are more than {MOST_ROWS:,} rows, which are the most of one answer: ask for a part of "
                        "them, or say with `limit` that the first ones are enough",
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
        """Cancel a query that runs or waits."""
        await self._call(subjects.QUERY_CANCEL, CancelRequest(query_id=query_id))

    async def history(self) -> ProcessorStatus:
        """How far the history is behind the bus, and how it fares."""
        return codec.decode(await self._call(subjects.HISTORY_STATUS, None), ProcessorStatus, codec.JSON)

    # Live

    def watch(self, *, hosts: Sequence[str] = (), devices: Sequence[str] = ()) -> AsyncIterator[DeviceSample]:
        """Samples as they come, from now on; all of the fleet where nothing is named.

        A consumer that falls behind loses the oldest, never the connection.
        """
        return subscriptions.samples(self.nc, hosts, devices)

    # How it is asked

    def _operator(self, operator: str | None) -> str:
        """Who signs: whoever the credentials are of, since the server looks at that."""
        if operator or self.identity.owner == ANY_OWNER:
            return operator or self.owner
        return self.identity.user or self.owner

    def _signed(self, subject: str, action: operations.DrainAction | operations.EvictAction) -> str:
        if not self.owned_subjects:
            return subject
        try:
            msgspec.convert(action.operator, requests.OwnerName)
        except msgspec.ValidationError:
            text = f"{action.operator!r} can't sign: letters, digits and _ @ . : / + -"
            raise InvalidRequest(text, "invalid", "$.operator") from None
        return f"{subject}.{action.operator}"


class Connecting:
    """What `connect` returns: await it for a client, or enter it with `async with`."""

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
        url: of the bus; `CORRAL_NATS_URL`, then the context in use, then the local default.
        owner: who asks; `CORRAL_OWNER`, then the context's, the credentials' owner, the account's name.
        credentials: path of a credentials file; `CORRAL_NATS_CREDS`, then those of the context with that URL.
        context: name of one that `corral context add` or `corral up` has written; goes before the environment.
        timeout: seconds to wait for an answer.
        patience: seconds to wait for a service that is not there.
        wait: seconds to wait for the bus at the start; None tries for ever.
        name: shown in the server's list of connections.
        options: further ones of `bus.connect`, such as `ca`, and of `nats.connect`.

    Raises:
        Unavailable: no server answered; the message says what to do.
    """

    async def start() -> Client:
        settings, named = way(url, credentials, context)
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
