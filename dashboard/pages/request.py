"""Request page: a form for a request, a prediction of its outcome while the user types, and the granted lease."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast
from urllib.parse import quote

from nicegui import Client as Page
from nicegui import background_tasks, ui
from starlette.requests import Request

from ...client import CorralError, InvalidRequest, Rejected
from ...client.notebook import short_model
from ...client.request import RequestFields
from ...schemas.operations import Explanation, QueueEntry
from ...schemas.requests import Assignment, Grant, Lease, Placement, Rejection
from ...schemas.values.units import format_bytes
from ..fleet import problem_of
from ..html import button, initial_text, on_choice, on_typing, remember, table, tag
from ..page_frame import Frame, NotAllowed, Notice
from ..security.accounts import Role
from ..zones import local

_TEXTS: Final = ("memory", "host_memory", "min_compute_capability", "ttl", "wait", "name", "policy", "within")
_LISTS: Final = ("models", "hosts")
_NUMBERS: Final[dict[str, type]] = {"gpus": int, "share": float, "cpus": float, "priority": int}
_DEFAULTS: Final = {"gpus": "1", "memory": "20GiB", "ttl": "1h"}
_FIELDS: Final = ("gpus", "memory", "models", "placement", "name", "ttl", "wait", "share", "cpus", "host_memory",
                  "hosts", "within", "min_compute_capability", "priority", "policy", "owner")  # fmt: skip
_PAUSE_SECONDS: Final = 0.3


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/request")
    async def page(request: Request) -> None:
        around = frame(request, "Request")
        await around.fleet.ready()
        given = {name: request.query_params[name][:256] for name in _FIELDS if name in request.query_params}
        with around.show("/request"):
            RequestPage(around, given or dict(_DEFAULTS))


def fields_of(form: dict[str, str]) -> RequestFields:
    """Convert the values of the form to fields of a request; empty ones are left out.

    Raises:
        InvalidRequest: a value isn't a valid number.
    """
    made: dict[str, Any] = {}
    for name, text in form.items():
        text = text.strip()
        if not text:
            continue
        if name in _NUMBERS:
            try:
                made[name] = _NUMBERS[name](text)
            except ValueError:
                raise InvalidRequest(f"{text!r} is not a number", "invalid", f"$.{name}") from None
        elif name in _LISTS:
            made[name] = [one.strip() for one in text.split(",") if one.strip()]
        elif name in _TEXTS or name in ("placement", "owner"):
            made[name] = text
    return cast("RequestFields", made)


class RequestPage:
    """The request page in one browser."""

    def __init__(self, frame: Frame, form: dict[str, str]) -> None:
        self.frame = frame
        self.form = form
        self._asked = 0
        self._asking: asyncio.Task[None] | None = None
        self._page: Page = ui.context.client
        with tag("div", "head"), tag("div"):
            tag("h1", text="Request GPUs")
            tag("div", "sub", "All devices are granted together, or none. The prediction updates while you type.")
        self._notice = Notice()
        with tag("div", "split"):
            with tag("section", "panel"):
                self._form()
            with tag("div", "main").style("padding:0;max-width:none"):
                self._outcome = tag("section", "panel")
                self._outcome.set_visibility(False)
                with tag("section", "panel"):
                    with tag("div", "panel-head"):
                        tag("h2", text="Prediction")
                    self._answer = tag("div")
        frame.on_refresh(lambda: self._notice.tell(frame.fleet.problem))
        ui.timer(0, self._explain, once=True)

    def _form(self) -> None:
        models = sorted({short_model(device.model) for device in self.frame.fleet.devices})
        may = self.frame.may(Role.REQUESTER)
        with tag("form", "form", autocomplete="off") as form:
            # Enter does the same as the button; the browser doesn't submit the form itself.
            form.on("submit.prevent", self._submit, [])
            self._field("gpus", "GPUs", "1", type="number", min=0, max=4096)
            self._field("memory", "Memory on each GPU", "20GiB")
            self._field("models", "Models", "any", "wide", list="models")
            with tag("datalist", id="models"):
                for model in models:
                    tag("option", value=f"*{model}*")
            self._choice("placement", "Placement", [
                ("", "all on one host"), (str(Placement.FEWEST_HOSTS), "on as few hosts as possible"),
                (str(Placement.SPREAD), "each on another host"),
            ])  # fmt: skip
            self._field("name", "Name of the workload", "train-llama")
            self._field("ttl", "Time to live", "1h; renew to keep it")
            self._field("wait", "Wait in the queue for", "don't wait; or 10m")
            with tag("details", "wide") as more:
                if any(self.form.get(name) for name in _FIELDS[7:]):
                    more.props["open"] = True
                tag("summary", "note link", "More")
                with tag("div", "form").style("margin-top:14px"):
                    self._field("share", "Share of one GPU", "whole", type="number", min=0.01, max=1, step="any")
                    self._field("hosts", "Hosts", "any; node-0*, node-1*")
                    self._field("within", "Several hosts within one", "any; rack, nvlink_domain")
                    self._field("cpus", "CPU cores in total", "none", type="number", min=0, step="any")
                    self._field("host_memory", "Host memory in total", "none; or 64GiB")
                    self._field("min_compute_capability", "Minimum compute capability", "any; or 8.0")
                    self._field("priority", "Priority", "0; the highest goes first", type="number")
                    self._field("policy", "Ranking policy", "the planner's default")
                    if self.frame.may(Role.OPERATOR):
                        self._field("owner", "For whom", self.frame.session.name)
            with tag("div", "bar wide"):
                tag("button", "btn primary", "Request", type="submit", disabled=not may or None)
                words = (
                    f"as {self.frame.session.name}" if may
                    else "Viewers see predictions; to request, you need the role requester."
                )  # fmt: skip
                tag("span", "note", words)

    def _field(self, name: str, label: str, placeholder: str, classes: str = "", **attributes: Any) -> None:
        with tag("label", classes):
            tag("span", text=label)
            field = tag("input", "field", name=name, placeholder=placeholder,
                        maxlength=256, **initial_text(self.form.get(name, "")), **attributes)  # fmt: skip
        on_typing(field, lambda text: self._typed(name, text), pause=0.1)

    def _choice(self, name: str, label: str, choices: list[tuple[str, str]]) -> None:
        with tag("label"):
            tag("span", text=label)
            with tag("select", "field", name=name) as field:
                for value, words in choices:
                    tag("option", "", words, value=value, selected=value == self.form.get(name, "") or None)
        on_choice(field, lambda value: self._typed(name, value))

    async def _typed(self, name: str, text: str) -> None:
        self.form[name] = text[:256]
        remember("/request", **{key: value for key, value in self.form.items() if value.strip()})
        await self._explain()

    # Prediction

    async def _explain(self) -> None:
        self._asked += 1
        asked = self._asked
        await asyncio.sleep(_PAUSE_SECONDS)
        if asked != self._asked:
            return
        try:
            fields = self._fields()
            found = await self.frame.ask(lambda client: client.explain(**fields))
        except InvalidRequest as error:
            self._show_latest(asked, lambda error=error: _wrong(error))
            return
        except CorralError as error:
            problem = problem_of(error, self.frame.fleet.url)
            self._show_latest(asked, lambda: Notice().tell(problem, whole=True))
            return
        self._show_latest(asked, lambda: _explained(found))

    def _show_latest(self, asked: int, show: Callable[[], None]) -> None:
        if asked == self._asked:
            self._answer.clear()
            with self._answer:
                show()

    def _fields(self) -> RequestFields:
        fields = fields_of(self.form)
        # Only operators may make requests for other owners; the field is ignored for all others.
        if "owner" not in fields or not self.frame.may(Role.OPERATOR):
            fields["owner"] = self.frame.session.name
        return fields

    # Request

    async def _submit(self) -> None:
        try:
            self.frame.require(Role.REQUESTER)
            fields = self._fields()
        except (NotAllowed, InvalidRequest) as error:
            ui.notify(str(error), type="negative")
            return
        self._say("Asking…")
        # The request continues if the user leaves the page; its lease is then on the leases page.
        self._asking = background_tasks.create(self._request(fields), name="request")

    async def _request(self, fields: RequestFields) -> None:
        def waits(entry: QueueEntry) -> None:
            self._in_page(
                lambda: self._say(f"Waiting, position {entry.position} in the queue", entry.message, waits=True)
            )

        try:
            answer = await self.frame.ask(lambda client: client.request(on_wait=waits, **fields))
        except Rejected as error:
            rejection = error.rejection
            self._in_page(lambda: self._show(lambda: _rejected(rejection)))
        except CorralError as error:
            text = str(error)
            self._in_page(lambda: self._say("That failed", text))
        else:
            self._in_page(lambda: self._show(lambda: self._granted(answer)))
            self.frame.fleet.refresh_soon()

    def _in_page(self, do: Callable[[], None]) -> None:
        if not self._page.is_deleted:
            with self._page:
                do()

    def _show(self, show: Callable[[], None]) -> None:
        self._outcome.clear()
        self._outcome.set_visibility(True)
        with self._outcome:
            show()

    def _say(self, title: str, text: str = "", waits: bool = False) -> None:
        def stop() -> None:
            # The client withdraws the request, and releases a lease that was granted at that moment.
            if self._asking is not None:
                self._asking.cancel()
            self._say("The request was withdrawn")

        def show() -> None:
            with tag("div", "panel-head"):
                with tag("div", "verdict", role="status"):
                    ui.icon("hourglass_empty" if waits else "info")
                    tag("span", text=title)
                if waits:
                    button("Stop waiting", stop, "small")
            if text:
                tag("div", "note", text)

        self._show(show)

    def _granted(self, answer: Assignment) -> None:
        lease = answer.lease
        with tag("div", "panel-head"):
            with tag("div", "verdict good", role="status"):
                ui.icon("check_circle")
                tag("span", text="Granted")
            button("Release", lambda: self._release(lease), "small")
        for warning in answer.warnings:
            tag("div", "note", warning)
        _grants(lease.grants)
        for host, variables in lease.environment.items():
            tag("div", "note", f"On {host}:").style("margin-top:12px")
            with tag("div", "empty slim").style("padding:0;align-items:stretch"):
                tag("pre", text="\n".join(f"export {name}={value}" for name, value in variables.items()))
        until = f"ends at {local(lease.expires_at, '%H:%M:%S %Z')}, unless it is renewed: corral renew {lease.lease_id}"
        tag("div", "note", f"Lease {lease.lease_id} of {lease.owner} {until}").style("margin-top:12px")

    async def _release(self, lease: Lease) -> None:
        async def act() -> None:
            user = self.frame.require(Role.REQUESTER)
            if user.name != lease.owner:
                self.frame.require(Role.OPERATOR)
            await self.frame.ask(lambda client: client.release(lease.lease_id, owner=lease.owner))

        if await self.frame.attempt(act, f"{lease.lease_id} is released"):
            self._outcome.set_visibility(False)
            await self._explain()


def _wrong(error: InvalidRequest) -> None:
    with tag("div", "verdict", role="status"):
        ui.icon("edit")
        tag("span", text=f"{error.field.removeprefix('$.')}: {error}" if error.field else str(error))


def _explained(found: Explanation) -> None:
    if not found.granted:
        if found.rejection is not None:
            _rejected(found.rejection)
        else:
            tag("div", "note", found.message)
        return
    with tag("div", "verdict good", role="status"):
        ui.icon("check_circle")
        tag("span", text="Granted at once")
    scored = sum(verdict.feasible for verdict in found.verdicts)
    tag("div", "note", f"{scored:,} devices are eligible; ranked by the policy {found.policy}.")
    _grants(found.grants)


def _grants(grants: list[Grant]) -> None:
    def device(grant: Grant) -> Callable[[], Any]:
        words = f"{grant.host} · GPU {grant.index}" if grant.device else grant.host
        target = f"/device/{quote(grant.device, safe='')}" if grant.device else None
        return lambda: tag("a", "", words, href=target)

    def gets(grant: Grant) -> str:
        parts = [format_bytes(grant.memory_bytes)] if grant.memory_bytes else []
        parts += [f"{grant.share:.0%} of it"] if grant.share < 1 else []
        parts += [f"{grant.cpus:g} cores"] if grant.cpus else []
        return ", ".join(parts) or "whole"

    def score(grant: Grant) -> Callable[[], Any]:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in grant.score_parts.items())
        return lambda: tag("span", "", f"{grant.score:.2f}", title=parts)

    rows = [(device(one), short_model(one.model), gets(one), score(one)) for one in grants[:32]]
    table(("Device", "Model", "Granted", "Score"), rows, numeric=(3,)).style("margin-top:10px")
    if len(grants) > 32:
        tag("div", "note", f"and {len(grants) - 32} more")


def _rejected(rejection: Rejection) -> None:
    with tag("div", "verdict bad", role="status"):
        ui.icon("do_not_disturb_on")
        tag("span", text=_CODES.get(rejection.code.value, rejection.code.value))
    if rejection.nearest:
        tag("div", "", f"Nearest: {rejection.nearest}").style("margin:8px 0")
    elif rejection.could_ever_fit:
        tag("div", "", "The fleet could hold it when idle: wait in the queue.").style("margin:8px 0")
    most = max((reason.devices for reason in rejection.reasons), default=1)

    def share(devices: int) -> Callable[[], Any]:
        def draw() -> None:
            with tag("div", "meter"):
                tag("i").style(f"width:{100 * devices / most:.0f}%")

        return draw

    rows = [(f"{one.devices:,}", share(one.devices), one.detail or one.code) for one in rejection.reasons]
    if rows:
        table(("Devices", "", "Why not"), rows, numeric=(0,))


_CODES: Final = {
    "no_capacity": "Not now",
    "impossible": "Never, on this fleet",
    "no_devices": "The planner knows no devices yet",
    "timed_out": "No devices became free in time",
}
