"""Checks of `corral doctor` on services that a fleet may do without: notifier, gateway, login, exporter, dashboard."""

from __future__ import annotations

import asyncio
import ssl
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import Final

from ...bus.credentials import Identity
from ...client import Client
from ...client.health import ask_health
from ...schemas.health import ServiceHealth
from ...schemas.instruments import ServiceKind
from .findings import Finding, note, ok, problem

_SOON: Final = timedelta(hours=1)
_TIMEOUT_SECONDS: Final = 3.0
_ANSWER_SECONDS: Final = 1.0
_COMMANDS: Final = {
    ServiceKind.GATEWAY: "corral serve-http",
    ServiceKind.EXPORTER: "corral export",
    ServiceKind.DASHBOARD: "corral dashboard",
    ServiceKind.LOGIN: "corral login-service",
}


async def optional(client: Client) -> list[Finding]:
    """Check the notifier, and gateway, exporter, dashboard and login service where they answer."""
    kinds = [ServiceKind.NOTIFIER, *_COMMANDS]
    answers = await asyncio.gather(
        *(ask_health(client.nc, kind.value, first_seconds=_ANSWER_SECONDS) for kind in kinds)
    )
    others = [_other(kind, found) for kind, found in zip(kinds[1:], answers[1:], strict=True) if found]
    return [_notifier(answers[0]), *others]


def _notifier(found: list[ServiceHealth]) -> Finding:
    if not found:
        return ok("notifier", "none answers: nobody is told when something happens (corral notifier)")
    active = [each for each in found if _values(each, "active")]
    if not active:
        why = "; ".join(dict.fromkeys(reason for each in found for reason in each.reasons)) or "all stand by"
        return problem("notifier", f"sends nothing: {why}", "see its log; nothing is lost until it sends again")
    reasons = [reason for each in active for reason in each.reasons]
    if reasons:
        return problem("notifier", "; ".join(reasons), "corral notify targets --operator shows what is wrong")
    lost = sum(_values(each, "given_up_messages") + _values(each, "lost_causes") for each in active)
    waiting = sum(_values(each, "waiting_messages") for each in active)
    detail = f"sends; {waiting:.0f} messages wait"
    if unusable := sum(_values(each, "unusable_rules") for each in active):
        return note(
            "notifier",
            f"{detail}; {unusable:.0f} rules name a target that is not there",
            "corral notify list --operator",
        )
    if lost:
        return note("notifier", f"{detail}; {lost:.0f} were given up since it started", "its log says to whom, and why")
    return ok("notifier", detail)


def _other(kind: ServiceKind, found: list[ServiceHealth]) -> Finding:
    what = "login service" if kind is ServiceKind.LOGIN else kind.value  # "login" is that of who asks
    if unready := [each for each in found if not each.ready]:
        why = "; ".join(f"{each.instance}: {', '.join(each.reasons)}" for each in unready)
        return problem(what, why, f"corral health {kind.value}; restart it: {_COMMANDS[kind]}")
    return ok(what, f"{len(found)} ready, on {', '.join(sorted({each.host for each in found}))}")


async def login(identity: Identity) -> Finding | None:
    """Check the login in use and its service; None if the credentials are no login."""
    place, expires = identity.login, identity.expires
    if not place:
        return None
    end = datetime.fromisoformat(expires) if expires else None
    left = "" if end is None else f", until {end.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    if why := await asyncio.to_thread(_unreachable, f"{place.rstrip('/')}/health"):
        return note(
            "login",
            f"by {place}{left}; it does not answer: {why}",
            "nobody can log in: start corral login-service there",
        )
    if end is not None and end - datetime.now(UTC) < _SOON:
        return note("login", f"by {place}{left}, which is soon", "corral login")
    return ok("login", f"by {place}{left}")


def _unreachable(url: str) -> str:
    """Reason why a URL gives no good answer; empty if it does. Certificates of a CA of its own count as an answer."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return f"status {error.code}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return "" if isinstance(reason, ssl.SSLCertVerificationError) else str(reason)


def _values(health: ServiceHealth, name: str) -> float:
    return sum(measure.value for measure in health.measures if measure.name == name)
