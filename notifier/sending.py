"""Sends messages with Apprise, each in a thread with a time limit. Apprise is imported when the first one is sent."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
import re
import threading
import time
from typing import Any, Final
from urllib.parse import unquote, unquote_plus

from msgspec import Struct

from .messages import Message, markdown, text
from .targets import Target

log = logging.getLogger("corral.notifier")

SEND_SECONDS: Final = 30.0
"""Time limit of an attempt. Apprise's own limits are shorter, but a name server may hang."""
_MAX_PROBLEM: Final = 300
_PLAIN: Final = frozenset({"json", "jsons", "xml", "xmls", "form", "forms", "mailto", "mailtos"})
"""Webhooks, whose readers are programs; and mail, since Apprise makes a broken plain part of HTML with code in it."""
_SECRET: Final = re.compile(r"[^/?&=:@#\s]{6,}")
_LONG: Final = 12
"""Length of a part of an address that is taken out of words, too."""
_URL: Final = re.compile(r"\b[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)
_NO_REASON: Final = "its service did not take the message, and does not say why"


class Sent(Struct, frozen=True):
    """Result of an attempt.

    Attributes:
        problem: what went wrong, without secrets; empty if it was sent.
        seconds: time that it took.
        hangs: true if the attempt has not ended within its time limit, and still goes on.
    """

    problem: str = ""
    seconds: float = 0.0
    hangs: bool = False


class Sender:
    """Sends messages to targets, to each one at a time.

    An attempt that hangs can't be ended. Until it ends, no other is made to the same target.

    Args:
        limit_seconds: time limit of an attempt.
    """

    def __init__(self, limit_seconds: float = SEND_SECONDS) -> None:
        self._limit_seconds = limit_seconds
        self._hanging: dict[str, threading.Thread] = {}

    async def send(self, target: Target, message: Message) -> Sent:
        """Send a message; never raises for what goes wrong with it."""
        if (thread := self._hanging.get(target.name)) is not None:
            if thread.is_alive():
                return Sent("the attempt before still hangs", hangs=True)
            del self._hanging[target.name]
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()
        began = time.monotonic()

        def end(problem: str) -> None:
            if not ended.done():
                ended.set_result(problem)

        def work() -> None:
            try:
                problem = deliver(target, message)
            except BaseException as error:  # a plugin may raise anything
                problem = redacted(f"{type(error).__name__}: {error}", target.url)
            try:
                loop.call_soon_threadsafe(end, problem)
            except RuntimeError:
                log.debug("the loop has ended before an attempt to send did")

        # A daemon, so that one that hangs does not keep the process from ending.
        thread = threading.Thread(target=work, name=f"send-{target.name}", daemon=True)
        thread.start()
        try:
            problem = await asyncio.wait_for(ended, self._limit_seconds)
        except TimeoutError:
            self._hanging[target.name] = thread
            return Sent(f"no answer within {self._limit_seconds:g} s", time.monotonic() - began, hangs=True)
        return Sent(problem, time.monotonic() - began)


def deliver(target: Target, message: Message) -> str:
    """Send a message, blocking.

    Returns:
        What went wrong, without secrets; empty if it was sent.
    """
    from apprise import NotifyFormat, OverflowMode

    plugin = instantiate(target.url)
    if plugin is None:
        return why_not(target.url)
    as_text = target.format == "text" or (not target.format and _wants_text(plugin))
    # Apprise writes the reason of a failure to its log, and only there.
    lines: list[str] = []
    handler = _Catch(lines)
    logger = logging.getLogger("apprise")
    logger.addHandler(handler)
    try:
        # `Apprise.notify` would use threads of its own.
        sent: bool = plugin.notify(
            title=message.title,
            body=text(message) if as_text else markdown(message),
            # A service refuses what is too long for it, and would for ever.
            overflow=OverflowMode.SPLIT if plugin.overflow_mode == OverflowMode.UPSTREAM else plugin.overflow_mode,
            body_format=NotifyFormat.TEXT if as_text else NotifyFormat.MARKDOWN,
            attach=_attachments(message) if plugin.attachment_support else None,
        )
    finally:
        logger.removeHandler(handler)
    return "" if sent else redacted("; ".join(dict.fromkeys(lines)) or _NO_REASON, target.url)


def _attachments(message: Message) -> Any | None:
    """Files of a message for Apprise; None without any."""
    if not message.files:
        return None
    from apprise import AppriseAttachment
    from apprise.attachment.memory import AttachMemory

    found = AppriseAttachment()
    for file in message.files:
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        found.add(AttachMemory(content=file.data, name=file.name, mimetype=kind))
    return found


class _Catch(logging.Handler):
    """Collects warnings of the current thread."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        if record.thread == self._thread and len(self._lines) < 8:
            self._lines.append(record.getMessage())


def _wants_text(plugin: Any) -> bool:
    if (plugin.schema or "") in _PLAIN:
        return True
    formats: Any = plugin.notify_format
    names = {str(getattr(each, "value", each)) for each in (formats if isinstance(formats, tuple) else (formats,))}
    return not names & {"markdown", "html"}


def instantiate(url: str) -> Any | None:
    """Apprise's plugin of an address; None if it is none."""
    from apprise import Apprise

    # Their lines may have parts of an address in them, which shall not get into the log.
    logging.getLogger("apprise").propagate = False
    logging.getLogger("urllib3").setLevel(logging.INFO)
    try:
        return Apprise.instantiate(url, suppress_exceptions=True)
    except Exception:  # a plugin may raise anything
        return None


def service_of(url: str) -> str:
    """Name of the service of an address, such as `E-Mail`; empty if the address is wrong."""
    plugin = instantiate(url)
    return "" if plugin is None else str(plugin.service_name)


def why_not(url: str) -> str:
    """Reason that an address can't be used, and what to do; empty if it can. The address is not in it."""
    if instantiate(url) is not None:
        return ""
    scheme, colon, _ = url.partition("://")
    if not colon:
        return "its url is none: write one such as mailtos://user:password@smtp.example?to=ann@example"
    known = _schemes()
    if scheme.lower() not in known:
        from ..schemas.values.misspelt import meant

        close = meant(scheme.lower(), known)
        hint = f"did you mean {close}://?" if close else "`apprise --details` lists them"
        return f"there is no service {scheme[:32]}://: {hint}"
    return f"its {scheme.lower()}:// url lacks something: see https://appriseit.com/services/ for its form"


def _schemes() -> set[str]:
    from apprise import Apprise

    found: set[str] = set()
    details: Any = Apprise().details()
    for schema in details["schemas"]:
        for key in ("protocols", "secure_protocols"):
            found.update(map(str, schema.get(key) or ()))
    return found


def redacted(problem: str, url: str) -> str:
    """A text without the parts of an address that may be secrets, and without any address."""
    _, _, rest = url.partition("://")
    found = _URL.sub("…", problem.replace(url, "…"))
    login, _, place = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
    host = place.partition(":")[0]
    parts = {*_SECRET.findall(rest), *filter(None, re.split(r"[:@]", login))}
    # Libraries decode what is escaped in a URL.
    parts |= {unquote_plus(part) for part in parts} | {unquote(part) for part in parts}
    for part in sorted(parts, key=len, reverse=True):
        if part != host:
            alone = rf"(?<![A-Za-z0-9.-]){re.escape(part)}(?![A-Za-z0-9])"
            found = re.sub(re.escape(part) if len(part) >= _LONG else alone, "…", found)
    found = " ".join(found.split())
    return found if len(found) <= _MAX_PROBLEM else f"{found[: _MAX_PROBLEM - 1]}…"
