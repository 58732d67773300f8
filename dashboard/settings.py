"""What a dashboard is told when it starts."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Final

from msgspec import Struct

from .security.accounts import Role

DEFAULT_PORT: Final = 8600


class SettingsError(ValueError):
    """The settings would serve the fleet to people whom nobody has let in."""


class Settings(Struct, frozen=True, kw_only=True):
    """How and to whom a dashboard is served.

    Attributes:
        state: folder of the cookie secret, the accounts and the link to log in; made with mode 0700.
        host: address to listen on.
        port: to listen on; 0 takes a free one, None the default one or, where that is taken, a free one.
        url: of the bus; None takes `CORRAL_NATS_URL`, then the local default.
        login: False lets everyone in who reaches the port, with `role`; only on loopback.
        role: of whoever comes by the link, or of everyone without login.
        names: further host names by which browsers may call this server (behind a proxy, say).
        secure: cookies travel by HTTPS alone: for a server behind a TLS proxy.
        trusted_proxies: addresses and networks whose word on a visitor's address is taken.
        session_seconds: someone who logged in stays so for so long.
        interval_seconds: between two looks at the fleet while somebody watches.
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
    session_seconds: float = 12 * 3600.0
    interval_seconds: float = 2.0

    def check(self) -> None:
        """Refuse what would be open to strangers.

        Raises:
            SettingsError: with what to do instead.
        """
        if not self.login and not is_loopback(self.host):
            raise SettingsError(
                f"{self.host} can be reached from other machines, so the dashboard wants a login there: "
                "leave --no-login away, or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
