"""ASGI middleware that checks every request and websocket, in front of the dashboard's application.

It makes three checks. The host name must be one of the server's (against DNS rebinding, where a page of another site
makes its name point here). Requests that could change something must come from the dashboard's pages (`Origin`). And
the user must be logged in. It also adds security headers to every response. NiceGUI compiles templates in the browser,
so the content security policy must allow `unsafe-eval`. Inline scripts of NiceGUI get a new nonce in each response, so
that no other inline script runs.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final
from urllib.parse import parse_qs, quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .sessions import COOKIE, Session, Sessions

SESSION_KEY: Final = "corral_session"
SOCKET_PATH: Final = "/_nicegui_ws/"
_OPEN_PATHS: Final = ("/login", "/login/openid", "/login/callback", "/health")
_OPEN_FOLDER: Final = "/assets/"
_SAFE: Final = ("GET", "HEAD", "OPTIONS")
_SCRIPT: Final = re.compile(rb"<script(?=[\s>])")
_FIXED_HEADERS: Final = {
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    # `no-referrer` would make browsers send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Passes a request with its session to `app`, or refuses it.

    Args:
        app: the application to protect.
        sessions: sessions of the users.
        hosts: host names of this server that are allowed in requests; empty allows any.
        secure: tell browsers to use HTTPS only (HSTS).
        owns: returns true if a page (a NiceGUI client id) was opened by a session.
    """

    def __init__(
        self,
        app: ASGIApp,
        sessions: Sessions,
        *,
        hosts: Iterable[str],
        secure: bool,
        owns: Callable[[str, Session], bool],
    ) -> None:
        self.app = app
        self._sessions = sessions
        self._hosts = frozenset(host.lower() for host in hosts)
        self._secure = secure
        self._owns = owns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request or websocket."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        session = self._sessions.read(cookie(headers))
        refusal = self._refusal(scope, headers, session)
        if scope["type"] == "websocket":
            if refusal is not None:
                await send({"type": "websocket.close", "code": 1008, "reason": "refused"})
                return
            await self.app(self._inner(scope, session), receive, send)
            return
        nonce = secrets.token_urlsafe(16)
        sending = _Sending(send, self._headers(headers, nonce), nonce)
        if refusal is not None:
            await refusal(scope, receive, sending)
        else:
            await self.app(self._inner(scope, session), receive, sending)

    def _refusal(self, scope: Scope, headers: Headers, session: Session | None) -> Response | None:
        path: str = scope["path"]
        if self._hosts and _hostname(headers.get("host", "")) not in self._hosts:
            return PlainTextResponse(
                f"Unknown host name {headers.get('host', '')!r}. To allow it, start the dashboard with --name.\n",
                421,
            )
        changes = scope["type"] == "websocket" or scope["method"] not in _SAFE
        origin = headers.get("origin")
        ours = origin is not None and urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
        if (changes and not ours) or (path.startswith(SOCKET_PATH) and origin is not None and not ours):
            return PlainTextResponse("Refused: the request did not come from a page of this dashboard.\n", 403)
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return PlainTextResponse("Refused: other sites may only link to this dashboard.\n", 403)
        if session is None:
            return None if path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER) else _login(scope, headers)
        if path.startswith(SOCKET_PATH):
            pages = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("client_id", [])
            if len(pages) != 1 or not self._owns(pages[0], session):
                return PlainTextResponse("Refused: this page belongs to another session.\n", 403)
        return None

    def _inner(self, scope: Scope, session: Session | None) -> Scope:
        # NiceGUI would insert the text of this header into the page.
        kept = [(name, value) for name, value in scope["headers"] if name.lower() != b"x-forwarded-prefix"]
        return {**scope, "headers": kept, SESSION_KEY: session}

    def _headers(self, headers: Headers, nonce: str) -> dict[str, str]:
        host = headers.get("host", "")
        # Older browsers don't treat a websocket to the same host as 'self'.
        sockets = f" ws://{host} wss://{host}" if re.fullmatch(r"[A-Za-z0-9.:\[\]-]+", host) else ""
        policy = (
            "default-src 'none'; "
            f"script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; "
            "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
            f"connect-src 'self'{sockets}; manifest-src 'self'; "
            "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        )
        found = {"Content-Security-Policy": policy, **_FIXED_HEADERS}
        if self._secure:
            found["Strict-Transport-Security"] = "max-age=31536000"
        return found


class _Sending:
    """ASGI `send` that adds the headers to a response; pages are buffered, to add a nonce to their scripts."""

    def __init__(self, send: Send, headers: dict[str, str], nonce: str) -> None:
        self._send = send
        self._headers = headers
        self._nonce = nonce
        self._start: Message | None = None
        self._body: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            for name, value in self._headers.items():
                headers.setdefault(name, value)
            # Pages of other sites may not read these responses, even if a library would allow it.
            for name in ("access-control-allow-origin", "access-control-allow-credentials", "server"):
                if name in headers:
                    del headers[name]
            if headers.get("x-nicegui-content") == "page":
                self._start = message
                return
            await self._send(message)
            return
        if self._start is None or message["type"] != "http.response.body":
            await self._send(message)
            return
        self._body.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        # Data in these pages has `<` escaped as `&lt;`, so every tag is NiceGUI's or the dashboard's.
        body = _SCRIPT.sub(f'<script nonce="{self._nonce}"'.encode(), b"".join(self._body))
        MutableHeaders(raw=self._start["headers"])["content-length"] = str(len(body))
        await self._send(self._start)
        self._start = None
        await self._send({"type": "http.response.body", "body": body})


def session_of(request: Any) -> Session:
    """Session of a request that the guard has passed.

    Raises:
        PermissionError: the request has no session.
    """
    session = request.scope.get(SESSION_KEY)
    if not isinstance(session, Session):
        raise PermissionError("log in first")
    return session


def cookie(headers: Headers, name: str = COOKIE) -> str | None:
    """Value of a cookie, by default of the session cookie; None if it isn't set."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return None
    return found.value if found else None


def safe_target(target: str) -> str:
    """Target of the redirection after login: the given path, or `/` if it would lead to another server."""
    parts = urlsplit(target)
    ours = target.startswith("/") and not target.startswith(("//", "/\\")) and not parts.netloc and not parts.scheme
    return target if ours and target.isprintable() else "/"


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _login(scope: Scope, headers: Headers) -> Response:
    if scope["type"] == "http" and scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
        query = scope.get("query_string", b"").decode("latin-1")
        target = scope["path"] + (f"?{query}" if query else "")
        return RedirectResponse(f"/login?next={quote(target, safe='')}", 303)
    return PlainTextResponse("Log in first.\n", 401)
