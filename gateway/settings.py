"""Settings of a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from msgspec import Struct

from ..bus.addresses import is_loopback

DEFAULT_PORT: Final = 8700


class SettingsError(ValueError):
    """The settings would send tokens over a network in the clear, or a file of theirs can't be used."""


class Settings(Struct, frozen=True, kw_only=True):
    """Settings of a gateway: address, TLS and limits.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        url: URL of the bus; None takes `CORRAL_NATS_URL`, then the local default.
        names: host names that clients may use for this server; for a loopback address its own names always count, for
            any other an empty tuple allows all.
        certificate: path of the server's certificate, with its chain; None serves plain HTTP.
        key: path of its key.
        plain: serve plain HTTP on an address that other machines can reach.
        trusted_proxies: addresses and networks of proxies whose `X-Forwarded-For` gives the addresses of clients.
        connections: HTTP connections at a time; a quarter of them from one address, unless it is a trusted proxy's.
        callers: connections to the bus at a time, one for each token in use.
        requests_per_caller: requests and streams of one token at a time.
        idle_seconds: a connection to the bus without requests is closed after this time.
        header_seconds: time limit for the headers of a request.
        body_seconds: time limit for its body.
        send_seconds: time limit for a client to take a piece of an answer.
        answer_seconds: time limit for an answer of a service that does not wait in the queue.
        patience_seconds: time for which a service may be away, during a restart for example, before a request fails.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    url: str | None = None
    names: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    plain: bool = False
    trusted_proxies: tuple[str, ...] = ()
    connections: int = 1000
    callers: int = 500
    requests_per_caller: int = 64
    idle_seconds: float = 60.0
    header_seconds: float = 10.0
    body_seconds: float = 20.0
    send_seconds: float = 60.0
    answer_seconds: float = 30.0
    patience_seconds: float = 2.0

    def check(self) -> None:
        """Refuse plain HTTP on an address that other machines can reach, unless it was asked for.

        Raises:
            SettingsError: the message says what to do instead.
        """
        if (self.certificate is None) != (self.key is None):
            raise SettingsError("--tls-cert and --tls-key go together")
        if self.certificate is None and not self.plain and not is_loopback(self.host):
            raise SettingsError(
                f"{self.host} can be reached from other machines, which could read tokens: give --tls-cert and "
                "--tls-key, or --plain if a proxy in front of it speaks TLS, or listen on 127.0.0.1"
            )

    @property
    def allowed_names(self) -> frozenset[str]:
        """Host names that requests may have; empty for any."""
        own = ("localhost", "127.0.0.1", "::1", self.host.strip("[]")) if is_loopback(self.host) else ()
        return frozenset(name.lower().strip("[]") for name in (*own, *self.names))
