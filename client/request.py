"""Builds work requests from keyword arguments: parses units, sets the default owner, validates before sending."""

from __future__ import annotations

import getpass
import math
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypedDict, cast

from ..bus.credentials import ANY_OWNER
from ..schemas import codec
from ..schemas.requests import Distribution, GpuRange, Method, Placement, WeightBy, WorkItem, WorkRequest
from ..schemas.values import plain, units
from ..schemas.values.misspelt import meant
from .errors import InvalidRequest

OWNER_VARIABLE: Final = "CORRAL_OWNER"
ANY_HOST: Final = "any"
"""Value of `hosts` that allows all hosts, also where the default would be this host only."""
_DURATIONS: Final = (
    ("ttl", "ttl_seconds"),
    ("wait", "wait_seconds"),
    ("expect", "expected_seconds"),
    ("max", "max_seconds"),
    ("grace", "grace_seconds"),
    ("min_run", "min_run_seconds"),
)
"""Arguments that are durations, with their fields."""
_GPUS: Final = re.compile(r"(-?[0-9]{1,6})(?:-([0-9]{1,6}))?")
_DISTRIBUTION: Final = ("items", "method", "weight_by", "memory_per_item_bytes", "max_items_per_device")


class RequestFields(TypedDict, total=False):
    """Keyword arguments of a work request; see `WorkRequest` for the meaning of each field.

    Amounts are text with a unit (`memory="20GiB"`, `ttl="10m"`, `wait="1h"`) or plain numbers of bytes and seconds.
    Numbers of NumPy and pandas are accepted, and `timedelta` for durations.
    """

    gpus: int | str | GpuRange
    """number of devices; "2-8" or a `GpuRange` for an elastic lease"""
    memory: str | int
    """memory of each device (`gpu_memory_bytes`)"""
    share: float
    """share of one device (`gpu_share`)"""
    cpus: float
    host_memory: str | int
    models: str | Sequence[str]
    vendors: str | Sequence[str]
    hosts: str | Sequence[str]
    host_labels: dict[str, str]
    min_compute_capability: str
    mig: bool | str
    """a MIG instance: True, or a glob over profiles such as `1g.10gb`"""
    allow_in_use: bool
    """allow devices that are in use without a lease"""
    placement: Placement | str
    gpus_per_host: int
    """so many devices on each of several hosts; `placement` is then `spread` by default"""
    within: str
    """a label, such as `rack`, whose value all hosts must share; `placement` is then `fewest_hosts` by default"""
    prefer_within: str
    """a label as `within`; hosts with different values are used if no one value has room now"""
    ttl: str | float
    wait: str | float
    expect: str | float
    """estimate of how long the work takes (`expected_seconds`)"""
    max: str | float
    """longest duration of the lease, however often it is renewed (`max_seconds`)"""
    preemptible: bool
    """the lease may be preempted, with a notice"""
    grace: str | float
    """time between the notice of a preemption and the end (`grace_seconds`)"""
    checkpoint: bool
    """the holder saves its work when it gets the notice"""
    min_run: str | float
    """the lease is not preempted before it has lasted so long (`min_run_seconds`)"""
    requeue_of: str
    """id of a preempted lease whose work goes on: the request gets its place in the queue"""
    request_id: str
    name: str
    labels: dict[str, str]
    policy: str
    priority: int
    owner: str
    items: int | Sequence[str | WorkItem]
    """work items to distribute over the devices"""
    method: Method | str
    weight_by: WeightBy | str
    memory_per_item: str | int
    max_items_per_device: int
    devices: str | Sequence[str]
    """uuids of the devices to grant, in this order; `gpus` is then their number"""
    distribution: Distribution
    """alternative to `items` and the arguments that describe them"""


_SHORTER: Final = {
    "gpu_memory_bytes": "memory",
    "gpu_share": "share",
    "host_memory_bytes": "host_memory",
    "ttl_seconds": "ttl",
    "wait_seconds": "wait",
    "expected_seconds": "expect",
    "max_seconds": "max",
    "grace_seconds": "grace",
    "min_run_seconds": "min_run",
}
"""Short argument names for fields of the request."""
_ARGUMENTS: Final = frozenset({*RequestFields.__annotations__, *WorkRequest.__struct_fields__})


def default_owner(holder: str = "") -> str:
    """Default owner of requests: `CORRAL_OWNER`, else the credentials' owner, else the name of the user account.

    Characters of the account's name that owners may not contain are replaced by `-`. An account without a name
    becomes `uid-NUMBER`.

    Args:
        holder: owner that the credentials name; empty or `*` (any owner) if they name none.
    """
    named = os.environ.get(OWNER_VARIABLE, "").strip() or ("" if holder == ANY_OWNER else holder)
    if named:
        return named
    try:
        account = getpass.getuser()
    except (KeyError, OSError):  # a container may run under an id without an account
        account = f"uid-{os.getuid()}"
    return re.sub(r"[^A-Za-z0-9_@.:/+-]", "-", account).lstrip(".:/+") or "nobody"


def work_request(owner: str, fields: RequestFields) -> WorkRequest:
    """Build and validate a request from keyword arguments.

    Args:
        owner: owner of the request, unless `fields` names one.
        fields: the keyword arguments.

    Raises:
        InvalidRequest: a field is unknown, has the wrong type or is out of range; `field` is its path where known.
    """
    given: dict[str, Any] = {name: plain.number(value) for name, value in fields.items()}
    _check_names(given)
    refuse_not_finite({name: value for name, value in given.items() if isinstance(value, float)})
    body: dict[str, Any] = {"owner": given.pop("owner", owner)}
    for name, target in (("memory", "gpu_memory_bytes"), ("host_memory", "host_memory_bytes")):
        if name in given:
            body[target] = _parsed(target, partial(_amount, name), given.pop(name))
    if "memory_per_item" in given:
        target = "memory_per_item_bytes"
        given[target] = _parsed(target, units.parse_bytes, given.pop("memory_per_item"))
    for name, target in _DURATIONS:
        if name in given:
            body[target] = _parsed(target, units.parse_seconds, given.pop(name))
    if isinstance(given.get("gpus"), str):
        given["gpus"] = parse_gpus(given["gpus"])
    if "share" in given:
        body["gpu_share"] = given.pop("share")
    for name in ("models", "vendors", "hosts"):
        if name in given:
            value = given.pop(name)
            body[name] = [value] if isinstance(value, str) else list(value)
    if "devices" in given:
        named = given.pop("devices")
        body["devices"] = [named] if isinstance(named, str) else list(named)
        given.setdefault("gpus", len(body["devices"]))
        given.setdefault("placement", Placement.FEWEST_HOSTS)
    if body.get("hosts") == [ANY_HOST]:
        del body["hosts"]
    described = [name for name in _DISTRIBUTION if name in given]
    if described:
        if "distribution" in given or "items" not in given:
            what = "either `distribution` or `items`" if "distribution" in given else f"`items` with `{described[0]}`"
            raise InvalidRequest(f"give {what}", "invalid", "$.distribution")
        distribution = {name: given.pop(name) for name in described}
        if not isinstance(distribution["items"], int):
            distribution["items"] = list(distribution["items"])
        body["distribution"] = distribution
    body.update(given)
    if body.get("gpus_per_host"):
        body.setdefault("placement", Placement.SPREAD)
    if body.get("within") or body.get("prefer_within"):
        body.setdefault("placement", Placement.FEWEST_HOSTS)
    return validated(body)


def refuse_not_finite(body: Any, path: str = "$") -> None:
    """Refuse numbers that JSON would encode as null, that is, as not given: `nan`, `inf` and `-inf`.

    Args:
        body: a message as Python's own types.
        path: path of the body.

    Raises:
        InvalidRequest: a number is not finite; `field` is its path.
    """
    if isinstance(body, float) and not math.isfinite(body):
        raise InvalidRequest(f"{path.removeprefix('$.')}={body} is not a finite number", "out_of_range", path)
    if isinstance(body, dict):
        for key, value in cast("dict[str, Any]", body).items():
            refuse_not_finite(value, f"{path}.{key}")
    elif isinstance(body, list):
        for at, value in enumerate(cast("list[Any]", body)):
            refuse_not_finite(value, f"{path}[{at}]")


def parse_gpus(text: str) -> int | GpuRange:
    """Parse a number of devices: `4`, or `2-8` for an elastic lease.

    Raises:
        InvalidRequest: it is neither.
    """
    found = _GPUS.fullmatch(text.strip())
    if found is None:
        raise InvalidRequest(f"gpus={text!r} is no number of devices: use 4, or 2-8", "invalid", "$.gpus")
    least, most = found.groups()
    if most is None:
        return int(least)
    try:
        return GpuRange(min=int(least), max=int(most))
    except ValueError as error:
        raise InvalidRequest(str(error), "invalid", "$.gpus") from None


def _check_names(given: dict[str, Any]) -> None:
    """Refuse unknown arguments, with a suggestion: a misspelled one would otherwise be ignored silently."""
    for name in given:
        if name not in _ARGUMENTS:
            near = meant(name, RequestFields.__annotations__) or meant(name, _ARGUMENTS)
            near = _SHORTER.get(near, near)
            hint = f": did you mean `{near}`?" if near else f": there are {', '.join(RequestFields.__annotations__)}"
            raise InvalidRequest(f"There is no argument `{name}`{hint}", "invalid", f"$.{name}")


def _parsed(field: str, parse: Callable[[Any], float], value: Any) -> float:
    """A quantity as a number; an error names the field."""
    try:
        return parse(value)
    except ValueError as error:
        raise InvalidRequest(str(error), "invalid", f"$.{field}") from None


def _amount(name: str, value: str | int) -> int:
    """Amount of memory in bytes. An `int` is a number of bytes; one that is implausibly small is refused."""
    amount = units.parse_bytes(value)
    if isinstance(value, int) and 0 < value < units.MIN_PLAIN_BYTES:
        raise ValueError(f"{name}={value} would be {value} bytes: use {name}='{value}GiB', or the number of bytes")
    return amount


def validated(body: WorkRequest | dict[str, Any]) -> WorkRequest:
    """Validate a request by decoding it as the planner would, so that errors are reported before it is sent.

    Raises:
        InvalidRequest: a field is invalid; `field` is its path.
    """
    try:
        return codec.decode(codec.encode(body, codec.JSON), WorkRequest, codec.JSON)
    except codec.DecodeError as error:
        raise InvalidRequest(str(error), error.code, error.field) from None
    except TypeError as error:
        raise InvalidRequest(str(error), "invalid") from None
