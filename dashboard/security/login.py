"""Login and logout: a plain HTML page with forms, without scripts."""

from __future__ import annotations

import asyncio
import html
import logging
import math
import time
from collections.abc import Callable
from typing import Final, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from ...login.rules import Rules
from .accounts import Account, Accounts
from .guard import cookie, safe_target
from .login_attempts import Attempts
from .proxies import HEADERS
from .sessions import BROWSER_COOKIE, COOKIE, GUEST_ID, Session, Sessions

log = logging.getLogger("corral.dashboard")

_BODY_BYTES: Final = 8192
_BROWSER_SECONDS: Final = 365 * 86400


class LoginPages:
    """Endpoints for login and logout.

    Args:
        accounts: accounts of the users.
        sessions: creates sessions and their cookies.
        seconds: lifetime of a session cookie.
        secure: mark cookies as `Secure`, so that browsers send them over HTTPS only.
        proxied: true if trusted proxies pass on the addresses of clients.
        ended: called with a session that has logged out.
        rules: of logins through an OpenID Connect provider; None for none.
    """

    def __init__(
        self,
        accounts: Accounts,
        sessions: Sessions,
        *,
        seconds: float,
        secure: bool,
        ended: Callable[[Session], None],
        proxied: bool = False,
        rules: Rules | None = None,
    ) -> None:
        self._accounts = accounts
        self._sessions = sessions
        self._seconds = seconds
        self._secure = secure
        self._ended = ended
        self._proxied = proxied
        self._attempts = Attempts()
        self._proxy_warned = False
        self._hashing = asyncio.Semaphore(2)
        self._issuer = "" if rules is None else urlsplit(rules.issuer).netloc
        self._openid: list[Route] = []
        if rules is not None:
            from .openid import OpenIdLogin

            self._openid = OpenIdLogin(
                rules, accounts, sessions, secure=secure, enter=self._enter, refuse=self._refuse
            ).routes()

    def routes(self) -> list[Route]:
        """Routes for `GET` and `POST /login` and `POST /logout`, and for logins through a provider."""
        return [
            *self._openid,
            Route("/login", self.page, methods=["GET"]),
            Route("/login", self.log_in, methods=["POST"]),
            Route("/logout", self.log_out, methods=["POST"]),
        ]

    async def page(self, request: Request) -> Response:
        """Show the login form, or log in with the token of a login link."""
        target = safe_target(request.query_params.get("next", "/"))
        token = request.query_params.get("token", "")
        if not token:
            return self._form(target)
        visitor = self._visitor(request)
        if (wait := self._must_wait(visitor)) is not None:
            return wait
        account = self._accounts.take_link(token)
        if account is None:
            self._failed(visitor)
            return self._form(target, "This link was used already, or a newer one exists.", 403)
        return self._in(account, target, visitor)

    async def log_in(self, request: Request) -> Response:
        """Log in with a name and password, or with a token, from the form."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _BODY_BYTES:
                return self._form("/", "The form is too long.", 413)
        form = {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}
        target = safe_target(form.get("next", "/"))
        name = "" if form.get("token") else form.get("name", "").strip()[:256]
        visitor = self._visitor(request, name)
        if (wait := self._must_wait(visitor)) is not None:
            return wait
        if form.get("token"):
            account = self._accounts.take_link(form["token"].strip())
            wrong = "This token was used already, or a newer one exists."
        else:
            async with self._hashing:
                # Other attempts may have failed while this one waited for the semaphore.
                if (wait := self._must_wait(visitor)) is not None:
                    return wait
                account = await asyncio.to_thread(self._accounts.check, name, form.get("password", ""))
                if account is None:
                    self._failed(visitor)
            wrong = "Name and password do not match."
        if account is None:
            if form.get("token"):
                self._failed(visitor)
            return self._form(target, wrong, 403)
        self._attempts.succeeded(*visitor)
        return self._in(account, target, visitor)

    async def log_out(self, request: Request) -> Response:
        """Log out."""
        session = self._sessions.read(cookie(request.headers))
        if session is not None and session.id != GUEST_ID:
            self._sessions.end(session)
            self._ended(session)
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE, httponly=True, samesite="lax", secure=self._secure)
        return response

    def _in(self, account: Account, target: str, visitor: _Visitor) -> Response:
        _, value = self._sessions.start(account)
        response = RedirectResponse(quote(target, safe="/:?&=%,+*~!$'()@;-._[]"), 303)
        # Lax, not strict, so that a link from another site opens without a new login.
        cookies = [(COOKIE, value, int(self._seconds))]
        if not visitor.browser and account.secret:
            cookies.append((BROWSER_COOKIE, self._sessions.browser(account.name), _BROWSER_SECONDS))
        for name, text, seconds in cookies:
            response.set_cookie(name, text, max_age=seconds, httponly=True, samesite="lax", secure=self._secure)
        return response

    def _enter(self, account: Account, target: str, request: Request) -> Response:
        return self._in(account, target, self._visitor(request, account.name))

    def _refuse(self, target: str, text: str, status: int) -> Response:
        return self._form(target, text, status)

    def _form(self, target: str, error: str = "", status: int = 200) -> HTMLResponse:
        return _page(target, self._passwords(), error, status, self._issuer)

    def _passwords(self) -> bool:
        return bool(self._accounts.all())

    def _visitor(self, request: Request, account: str = "") -> _Visitor:
        if not self._proxy_warned and any(name.lower() in HEADERS for name, _ in request.headers.raw):
            self._proxy_warned = True
            if not self._proxied:
                log.warning(
                    "requests come through a proxy, so all clients count as one address in the limit of failed logins: "
                    "set --trusted-proxy"
                )
        browser = self._sessions.known_browser(cookie(request.headers, BROWSER_COOKIE), account) if account else ""
        return _Visitor(account, request.client.host if request.client else "", browser)

    def _failed(self, visitor: _Visitor) -> None:
        self._attempts.failed(*visitor, time.monotonic())

    def _must_wait(self, visitor: _Visitor) -> Response | None:
        seconds = math.ceil(self._attempts.wait_seconds(*visitor, time.monotonic()))
        if not seconds:
            return None
        text = f"Too many attempts. Wait {seconds} seconds, then try again."
        response = self._form("/", text, 429)
        response.headers["Retry-After"] = str(seconds)
        return response


class _Visitor(NamedTuple):
    """Source of a login attempt: the account, the client's address, and the known browser's id, if any."""

    account: str
    address: str
    browser: str


def _page(target: str, passwords: bool, error: str, status: int, issuer: str) -> HTMLResponse:
    by_name = (
        '<label>Name<input name="name" autocomplete="username" autocapitalize="none" required autofocus></label>'
        '<label>Password<input name="password" type="password" autocomplete="current-password" required></label>'
    )
    by_token = '<label>Token<input name="token" type="password" autocomplete="off" required autofocus></label>'
    hint = (
        "Ask the operator of this dashboard for an account: <code>corral dashboard user NAME</code>."
        if passwords
        else "Open the link that <code>corral dashboard</code> printed, or get a new one with "
        "<code>corral dashboard link</code>. For an account with a password: <code>corral dashboard user NAME</code>."
    )
    by_provider = (
        f'<a class="login-provider" href="/login/openid?next={quote(target, safe="")}">Log in with '
        f"{html.escape(issuer)}</a>"
        if issuer
        else ""
    )
    told = f'<p class="login-error" role="alert">{html.escape(error)}</p>' if error else ""
    return HTMLResponse(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Log in · Corral</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="icon" href="/assets/icon.svg"><link rel="stylesheet" href="/assets/corral.css"></head>
<body class="login"><main><img src="/assets/icon.svg" alt="" width="44" height="44"><h1>Corral</h1>
<form method="post" action="/login">{told}<input type="hidden" name="next" value="{html.escape(target)}">
{by_provider}{by_name if passwords else by_token}<button>Log in</button></form>
<p class="login-hint">{hint}</p></main></body></html>
""",
        status,
        headers={"Cache-Control": "no-store"},
    )
