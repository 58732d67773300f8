"""Times in the zone of the reader: the browser's, whose name is in a cookie, or UTC if the reader prefers that."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from typing import Final
from urllib.parse import unquote
from zoneinfo import ZoneInfo

from nicegui import ui

ZONE_COOKIE: Final = "corral_zone"
UTC_COOKIE: Final = "corral_utc"
_ZONE_OF_PAGE: Final = "corral_zone"
_LONGEST: Final = 64


def zone_of(cookies: Mapping[str, str]) -> tzinfo:
    """The zone that a browser asks for; UTC if it names none that is known here."""
    name = unquote(cookies.get(ZONE_COOKIE, ""))
    if cookies.get(UTC_COOKIE) == "1" or not 0 < len(name) <= _LONGEST:
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return UTC


def follow_zone(cookies: Mapping[str, str]) -> None:
    """Show the times of this page in the zone that its browser asks for; reload it once if that was not known yet."""
    ui.context.client.storage[_ZONE_OF_PAGE] = zone_of(cookies)
    # A zone that the browser asked for and that is not known here is not asked for again.
    known = unquote(cookies.get(ZONE_COOKIE, "")) or "UTC"
    ui.run_javascript(
        "const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;"
        f"document.cookie = `{ZONE_COOKIE}=${{encodeURIComponent(zone)}};path=/;max-age=31536000;samesite=lax`;"
        f"if (zone !== {known!r} && document.cookie.includes('{ZONE_COOKIE}=')) location.reload();"
    )


def prefer_utc(wanted: bool) -> None:
    """Remember whether the reader wants UTC, and show the page again."""
    ui.run_javascript(
        f"document.cookie = '{UTC_COOKIE}={int(wanted)};path=/;max-age=31536000;samesite=lax'; location.reload();"
    )


def _zone() -> tzinfo:
    return ui.context.client.storage.get(_ZONE_OF_PAGE, UTC)


def local(at: datetime | float | str, form: str = "%d %b %H:%M:%S") -> str:
    """A time, seconds since the epoch, or a time as text as it is in answers without pyarrow, in the reader's zone."""
    if isinstance(at, str):
        moment = datetime.fromisoformat(at)
    else:
        moment = datetime.fromtimestamp(at, UTC) if isinstance(at, int | float) else at
    return moment.astimezone(_zone()).strftime(form)


def zone_name(at: datetime | float | str | None = None) -> str:
    """Abbreviation of the reader's zone at a time; now if it is None."""
    return local(datetime.now(UTC) if at is None else at, "%Z")
