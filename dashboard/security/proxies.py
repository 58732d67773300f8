"""Addresses of clients behind trusted proxies.

uvicorn reads `X-Forwarded-For` from the right, where the nearest proxy has written, up to the first address that isn't
a trusted proxy's; addresses further left may be forged by the client. `Forwarded` (RFC 7239) is read in the same way
if `X-Forwarded-For` is missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from ...bus.addresses import unmapped

HEADERS: Final = (b"x-forwarded-for", b"forwarded")
_FOR: Final = re.compile(r'(?:^|[;,\s])for=(?:"([^"]*)"|([^;,\s]*))', re.IGNORECASE)


def with_proxy_headers(app: ASGIApp, trusted: Sequence[str]) -> ASGIApp:
    """Wrap an application so that requests from trusted proxies have the clients' addresses; unchanged without any."""
    if not trusted:
        return app
    inner: Any = ProxyHeadersMiddleware(cast("Any", app), list(trusted))

    async def with_client_address(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = {**scope, "headers": _with_forwarded(scope["headers"])}
            if scope.get("client"):
                host, port = scope["client"]
                scope["client"] = (unmapped(host), port)
        await inner(scope, receive, send)

    return with_client_address


def _with_forwarded(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    names = {name for name, _ in headers}
    if HEADERS[0] in names or HEADERS[1] not in names:
        return headers
    text = ",".join(value.decode("latin-1") for name, value in headers if name == HEADERS[1])
    found = [quoted or plain for quoted, plain in _FOR.findall(text)]
    return [*headers, (HEADERS[0], ", ".join(found).encode("latin-1"))] if found else headers
