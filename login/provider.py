"""An OpenID Connect provider as Corral uses it: the device flow, the code flow with PKCE, and verified claims."""

# authlib and joserfc type their tokens and metadata as plain dictionaries of anything.

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
from authlib.integrations.httpx_client import AsyncOAuth2Client, OAuthError
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from joserfc.jws import JWSRegistry
from msgspec import Struct

from .rules import Rules, RulesError, check_url

DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"
ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures that are accepted: those with a key that the provider alone has."""
LEEWAY_SECONDS: Final = 60
"""Difference between the clocks of the provider and of this machine that is accepted."""
_TIMEOUT_SECONDS: Final = 10.0
_METADATA_SECONDS: Final = 3600.0
_KEYS_SECONDS: Final = 30.0
"""The provider's keys are fetched again for an unknown one, at most so often."""
_SLOW_DOWN_SECONDS: Final = 5.0
"""RFC 8628, section 3.5."""


class ProviderError(Exception):
    """The provider does not answer, or not as it should; the message is for the person who logs in."""


class ProviderAway(ProviderError):
    """The provider does not answer just now."""


class Denied(Exception):
    """The person, or the provider, has denied the login, or too much time has passed."""


class DeviceCode(Struct, frozen=True, kw_only=True):
    """A device flow that has begun (RFC 8628, section 3.2).

    Attributes:
        device_code: secret that is exchanged for tokens.
        user_code: code that the person enters or compares.
        verification_uri: page where to enter it.
        verification_uri_complete: page that has it; empty if there is none.
        expires_seconds: time in which it must be entered.
        interval_seconds: shortest time between two questions whether it was.
    """

    device_code: str
    user_code: str
    verification_uri: str
    verification_uri_complete: str = ""
    expires_seconds: float = 600.0
    interval_seconds: float = 5.0


class Pending(Struct, frozen=True):
    """The person has not decided yet.

    Attributes:
        interval_seconds: time to wait before the next question.
    """

    interval_seconds: float


class Provider:
    """A provider, by its discovery document.

    Args:
        rules: issuer and client.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._metadata: dict[str, Any] = {}
        self._metadata_at = float("-inf")
        self._keys: KeySet | None = None
        self._keys_at = float("-inf")
        self._lock = asyncio.Lock()

    async def begin_device_flow(self) -> DeviceCode:
        """Begin a device flow.

        Raises:
            ProviderError: the provider has none, or does not answer.
        """
        metadata = await self.metadata()
        url = self.rules.device_authorization_endpoint or metadata.get("device_authorization_endpoint")
        if not url:
            raise ProviderError(
                f"{self.rules.issuer} does not name a device flow: if it has one, the operator of Corral can set "
                "device_authorization_endpoint"
            )
        form = {"client_id": self.rules.client_id, "scope": " ".join(self.rules.scopes)}
        if secret := self._secret():
            form["client_secret"] = secret
        answer = await self._json("POST", str(url), form)
        try:
            return DeviceCode(
                device_code=str(answer["device_code"]),
                user_code=str(answer["user_code"]),
                verification_uri=_page(answer["verification_uri"]),
                verification_uri_complete=_page(answer.get("verification_uri_complete") or ""),
                expires_seconds=float(answer["expires_in"]),
                interval_seconds=max(1.0, float(answer.get("interval") or 5.0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProviderError(f"{self.rules.issuer} began no device flow: {answer.get('error', error)!s}") from None

    async def poll_device_flow(self, device_code: str, interval_seconds: float) -> dict[str, Any] | Pending:
        """Ask for the tokens of a device flow once.

        Returns:
            Verified claims of the person; `Pending` if they have not decided yet.

        Raises:
            Denied: they have refused, or it took too long.
            ProviderError: the provider does not answer as it should.
        """
        metadata = await self.metadata()
        form = {"grant_type": DEVICE_GRANT, "device_code": device_code, "client_id": self.rules.client_id}
        if secret := self._secret():
            form["client_secret"] = secret
        answer = await self._json("POST", str(metadata["token_endpoint"]), form)
        match answer.get("error"):
            case None:
                return await self._claims(answer, nonce=None)
            case "authorization_pending":
                return Pending(interval_seconds)
            case "slow_down":
                return Pending(interval_seconds + _SLOW_DOWN_SECONDS)
            case "access_denied":
                raise Denied("the login was refused")
            case "expired_token":
                raise Denied("the code was not entered in time")
            case other:
                raise ProviderError(f"{self.rules.issuer} gave no tokens: {_error(answer, other)}")

    async def authorization_url(self, redirect_uri: str, state: str, nonce: str, code_verifier: str) -> str:
        """URL of the provider's login page, for the code flow with PKCE.

        Raises:
            ProviderError: the provider does not answer.
        """
        metadata = await self.metadata()
        async with self._client(redirect_uri) as client:
            url, _ = client.create_authorization_url(
                metadata["authorization_endpoint"], state=state, nonce=nonce, code_verifier=code_verifier
            )
        return str(url)

    async def exchange(self, code: str, redirect_uri: str, nonce: str, code_verifier: str) -> dict[str, Any]:
        """Verified claims of the person who came back from the login page with a code.

        Raises:
            Denied: the code is wrong or was used.
            ProviderError: the provider does not answer, or its token is not for us.
        """
        metadata = await self.metadata()
        try:
            async with self._client(redirect_uri) as client:
                token = await client.fetch_token(
                    metadata["token_endpoint"], grant_type="authorization_code", code=code, code_verifier=code_verifier
                )
        except OAuthError as error:
            raise Denied(f"{self.rules.issuer} refused the login: {error}") from None
        except (httpx.HTTPError, ValueError) as error:
            raise self._silent(error) from None
        return await self._claims(dict(token), nonce=nonce)

    async def metadata(self) -> dict[str, Any]:
        """The provider's discovery document, at most an hour old.

        Raises:
            ProviderError: it can't be had, or is another issuer's.
        """
        async with self._lock:
            if time.monotonic() - self._metadata_at < _METADATA_SECONDS:
                return self._metadata
            url = f"{self.rules.issuer.rstrip('/')}/.well-known/openid-configuration"
            found = await self._json("GET", url)
            if found.get("issuer") != self.rules.issuer:
                raise ProviderError(
                    f"{url} is the document of {found.get('issuer')!r}: write that as issuer, or correct the provider"
                )
            for name in ("token_endpoint", "jwks_uri", "authorization_endpoint", "userinfo_endpoint"):
                if name in found or name in ("token_endpoint", "jwks_uri"):
                    try:
                        check_url(f"{url}: {name}", str(found.get(name)))
                    except RulesError as error:
                        raise ProviderError(str(error)) from None
            self._metadata, self._metadata_at = found, time.monotonic()
            return found

    async def check(self) -> None:
        """Ask the provider for its discovery document, however new the one before is.

        Raises:
            ProviderError: it can't be had, or is another issuer's.
        """
        self._metadata_at = float("-inf")
        await self.metadata()

    async def _claims(self, token: Mapping[str, Any], nonce: str | None) -> dict[str, Any]:
        """Claims of the id token, if there is one, and of the userinfo endpoint.

        The access token comes from the provider itself, on a connection of ours. So its userinfo is that of the person
        who has logged in to this client, even where a provider issues no id token in the device flow, as
        django-oauth-toolkit 3.4 does.
        """
        claims: dict[str, Any] = {}
        if token.get("id_token"):
            claims = await self.verified(str(token["id_token"]), nonce)
        elif nonce is not None:
            raise ProviderError(f"{self.rules.issuer} has sent no id token")
        more = await self._userinfo(str(token.get("access_token") or ""))
        if claims and more and more.get("sub") != claims.get("sub"):
            raise ProviderError(f"{self.rules.issuer} tells of two people at once")  # OpenID Connect Core, 5.3.2
        if not claims and not more.get("sub"):
            raise ProviderError(f"{self.rules.issuer} does not say who has logged in")
        return {**more, **claims}

    async def verified(self, id_token: str, nonce: str | None) -> dict[str, Any]:
        """Claims of an id token whose signature, issuer, audience, times and nonce are right.

        Raises:
            ProviderError: one is not.
        """
        try:
            try:
                token = jwt.decode(id_token, await self._key_set(), registry=_REGISTRY)
            except (JoseError, ValueError):
                # The provider may have changed its keys.
                token = jwt.decode(id_token, await self._key_set(renew=True), registry=_REGISTRY)
            claims: dict[str, Any] = dict(token.claims)
            jwt.JWTClaimsRegistry(
                leeway=LEEWAY_SECONDS,
                iss={"essential": True, "value": self.rules.issuer},
                aud={"essential": True, "value": self.rules.client_id},
                sub={"essential": True},
                exp={"essential": True},
                iat={"essential": True},
            ).validate(claims)
        except (JoseError, ValueError, TypeError) as error:
            raise ProviderError(f"the id token of {self.rules.issuer} is not valid: {error}") from None
        audience = claims["aud"]
        several = isinstance(audience, list) and len(audience) > 1  # pyright: ignore[reportUnknownArgumentType]
        if claims.get("azp", None if several else self.rules.client_id) != self.rules.client_id:
            raise ProviderError(f"the id token of {self.rules.issuer} is for another client")
        if nonce is not None and claims.get("nonce") != nonce:
            raise ProviderError(f"the id token of {self.rules.issuer} is that of another login")
        return claims

    async def _userinfo(self, access_token: str) -> dict[str, Any]:
        url = (await self.metadata()).get("userinfo_endpoint")
        if not url or not access_token:
            return {}
        return await self._json("GET", str(url), headers={"Authorization": f"Bearer {access_token}"})

    async def _key_set(self, *, renew: bool = False) -> KeySet:
        metadata = await self.metadata()
        async with self._lock:
            # A key that the provider has withdrawn does not count for longer than the rest of what is known of it.
            oldest = _KEYS_SECONDS if renew else _METADATA_SECONDS
            if self._keys is None or time.monotonic() - self._keys_at > oldest:
                keys: Any = await self._json("GET", str(metadata["jwks_uri"]))
                try:
                    self._keys = KeySet.import_key_set(keys)
                except (KeyError, TypeError) as error:
                    raise ProviderError(f"{metadata['jwks_uri']} has no keys: {error}") from None
                self._keys_at = time.monotonic()
            return self._keys

    def _secret(self) -> str:
        if not self.rules.client_secret_file:
            return ""
        try:
            return Path(self.rules.client_secret_file).expanduser().read_text().strip()
        except OSError as error:
            raise ProviderError(f"the operator of Corral must mend client_secret_file: {error.strerror}") from None

    def _client(self, redirect_uri: str) -> Any:
        return AsyncOAuth2Client(
            client_id=self.rules.client_id,
            client_secret=self._secret() or None,
            token_endpoint_auth_method="client_secret_basic" if self.rules.client_secret_file else "none",
            scope=" ".join(self.rules.scopes),
            redirect_uri=redirect_uri,
            code_challenge_method="S256",
            timeout=_TIMEOUT_SECONDS,
        )

    async def _json(
        self, method: str, url: str, form: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        try:
            async with httpx.AsyncClient(timeout=_TIMEOUT_SECONDS) as client:
                answer = await client.request(
                    method, url, data=form, headers={"Accept": "application/json"} | dict(headers or {})
                )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._silent(error) from None
        try:
            found: Any = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict) or (answer.is_error and "error" not in found):
            later = answer.is_server_error or answer.status_code == 429
            kind = ProviderAway if later else ProviderError
            raise kind(f"{self.rules.issuer} answers {answer.status_code} at {url}")
        if answer.is_error and method == "GET":
            raise ProviderError(f"{self.rules.issuer} answers {answer.status_code} at {url}: {_error(found, '')}")
        return found  # pyright: ignore[reportUnknownVariableType]

    def _silent(self, error: Exception) -> ProviderAway:
        return ProviderAway(f"{self.rules.issuer} does not answer: {type(error).__name__} {error}")


_REGISTRY: Final = JWSRegistry(algorithms=list(ALGORITHMS), strict_check_header=False)


def _page(url: object) -> str:
    """URL of a page for the person's browser.

    Raises:
        ValueError: it is none.
    """
    text = str(url)
    if text and urlsplit(text).scheme not in ("https", "http"):
        raise ValueError(f"{text!r} is no page")
    return text


def _error(answer: Mapping[str, Any], code: object) -> str:
    return str(answer.get("error_description") or answer.get("error") or code)[:300]
