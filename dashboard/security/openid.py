"""Login through an OpenID Connect provider: the code flow with PKCE, and accounts for those who come back from it."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from itsdangerous import BadSignature
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ...login.provider import Denied, Provider, ProviderError
from ...login.rules import LoginRefused, Rules, person
from .accounts import Account, Accounts, Role
from .guard import cookie, safe_target
from .sessions import Sessions

log = logging.getLogger("corral.dashboard")

START_PATH: Final = "/login/openid"
CALLBACK_PATH: Final = "/login/callback"
COOKIE: Final = "corral_openid"
_SECONDS: Final = 600.0
"""Time in which somebody must come back from the provider."""


class Attempt(Struct, frozen=True, array_like=True):
    """A login that the provider has not confirmed yet, as the browser keeps it in a signed cookie.

    Attributes:
        state: what the provider must send back.
        nonce: what its token must have.
        verifier: secret behind the challenge of PKCE (RFC 7636).
        target: page to show then.
        expires: epoch seconds.
    """

    state: str
    nonce: str
    verifier: str
    target: str
    expires: float


class OpenIdLogin:
    """Endpoints for the login through a provider.

    Args:
        rules: provider, and rules for its claims.
        accounts: accounts of the users, which remember those who have logged in.
        sessions: signs the cookie.
        secure: the browsers use HTTPS.
        enter: starts a session of an account, and shows a page.
        refuse: shows the login page with an error: target, message and status.
    """

    def __init__(
        self,
        rules: Rules,
        accounts: Accounts,
        sessions: Sessions,
        *,
        secure: bool,
        enter: Callable[[Account, str, Request], Response],
        refuse: Callable[[str, str, int], Response],
    ) -> None:
        self._rules = rules
        self._provider = Provider(rules)
        self._accounts = accounts
        self._signer = sessions.signer("corral.dashboard.openid")
        self._secure = secure
        self._enter = enter
        self._refuse = refuse

    def routes(self) -> list[Route]:
        """Routes for the way to the provider, and back."""
        return [
            Route(START_PATH, self.start, methods=["GET"]),
            Route(CALLBACK_PATH, self.back, methods=["GET"]),
        ]

    async def start(self, request: Request) -> Response:
        """Send the browser to the provider."""
        attempt = Attempt(
            state=secrets.token_urlsafe(24),
            nonce=secrets.token_urlsafe(24),
            verifier=secrets.token_urlsafe(48),
            target=safe_target(request.query_params.get("next", "/")),
            expires=time.time() + _SECONDS,
        )
        try:
            url = await self._provider.authorization_url(
                self._redirect_uri(request), attempt.state, attempt.nonce, attempt.verifier
            )
        except ProviderError as error:
            log.warning("%s", error)
            return self._refuse(attempt.target, str(error), 503)
        response = RedirectResponse(url, 303)
        response.set_cookie(
            COOKIE,
            self._signer.dumps(msgspec.to_builtins(attempt)),
            max_age=int(_SECONDS),
            path="/login",
            httponly=True,
            samesite="lax",
            secure=self._secure,
        )
        return response

    async def back(self, request: Request) -> Response:
        """Log in who comes back from the provider."""
        attempt = self._attempt(request)
        if attempt is None:
            return self._refuse("/", "This login was not begun in this browser, or too long ago. Log in again.", 403)
        if error := request.query_params.get("error"):
            told = request.query_params.get("error_description") or error
            return self._refuse(attempt.target, f"{self._rules.issuer} refused the login: {told[:200]}", 403)
        try:
            claims = await self._provider.exchange(
                request.query_params.get("code", ""), self._redirect_uri(request), attempt.nonce, attempt.verifier
            )
            who = person(claims, self._rules)
            account = self._accounts.remember(who.owner, Role(who.role), self._rules.hours * 3600.0)
        except (Denied, LoginRefused) as error:
            log.info("a login was refused: %s", error)
            return self._refuse(attempt.target, str(error), 403)
        except ProviderError as error:
            log.warning("%s", error)
            return self._refuse(attempt.target, str(error), 503)
        if account is None:
            text = f"{who.owner} has an account with a password here: log in with that, or have it removed."
            return self._refuse(attempt.target, text, 403)
        log.info("%s logged in through %s as %s", account.name, self._rules.issuer, account.role)
        response = self._enter(account, attempt.target, request)
        response.delete_cookie(COOKIE, path="/login", httponly=True, samesite="lax", secure=self._secure)
        return response

    def _attempt(self, request: Request) -> Attempt | None:
        """The attempt that this browser has begun, if the provider's answer is to it."""
        try:
            body: Any = self._signer.loads(cookie(request.headers, COOKIE) or "")
            found = msgspec.convert(body, Attempt)
        except (BadSignature, msgspec.ValidationError):
            return None
        same = secrets.compare_digest(found.state.encode(), request.query_params.get("state", "").encode())
        return found if same and found.expires > time.time() else None

    def _redirect_uri(self, request: Request) -> str:
        # The guard lets only the dashboard's own host names through.
        scheme = "https" if self._secure else request.url.scheme
        return f"{scheme}://{request.headers.get('host', '')}{CALLBACK_PATH}"
