"""Settings of a dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from msgspec import Struct

from ..bus.addresses import is_loopback
from ..client.reports.prices import Prices
from ..login.rules import Rules
from .security.accounts import Role

DEFAULT_PORT: Final = 8600


class SettingsError(ValueError):
    """The settings would give access to users who haven't logged in."""


class Settings(Struct, frozen=True, kw_only=True):
    """Settings of a dashboard: address, login and refresh interval.

    Attributes:
        state: folder of the cookie secret, the accounts and the login link; created with mode 0700.
        host: address to listen on.
        port: port to listen on; 0 takes a free one, None the default port, or a free one if that is taken.
        url: URL of the bus; None takes `CORRAL_NATS_URL`, then the local default.
        login: require a login; false gives everyone who can reach the port `role`, on loopback only.
        role: role of the login link, or of all users if no login is required.
        names: further host names that browsers may use for this server (behind a proxy, for example).
        secure: send cookies over HTTPS only, for a server behind a TLS proxy.
        trusted_proxies: addresses and networks of proxies whose headers give the addresses of clients.
        openid: rules of logins through an OpenID Connect provider; None for none.
        session_seconds: lifetime of a session.
        interval_seconds: seconds between refreshes of the fleet's state while a page is open.
        prices: price list of usage reports; None for reports without costs.
    """

    state: Path
    host: str = "127.0.0.1"
    port: int | None = None
    url: str | None = None
    login: bool = True
    role: Role = Role.OPERATOR
    names: tuple[str, ...] = ()
    secure: bool = False
    trusted_proxies: tuple[str, ...] = ()
    openid: Rules | None = None
    session_seconds: float = 12 * 3600.0
    interval_seconds: float = 2.0
    prices: Prices | None = None

    def check(self) -> None:
        """Refuse settings without a login on an address that other machines can reach.

        Raises:
            SettingsError: the message says what to do instead.
        """
        if not self.login and not is_loopback(self.host):
            raise SettingsError(
                f"{self.host} can be reached from other machines, so a login is required: "
                "omit --no-login, or listen on 127.0.0.1"
            )
