"""Receivers of notifications on loopback: a webhook, as ntfy and the like are, and a mail server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes
from email.message import Message
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.smtp import SMTP


class Webhook:
    """An HTTP server that keeps what is posted to it.

    Attributes:
        url: of Apprise, for its JSON webhook.
        ntfy: of Apprise, for ntfy.
        bodies: of the posts that were taken, in their order.
        tries: number of posts, also of those that were not taken.
        status: of its answers; others than 200 take nothing.
        held: posts are answered while it is set.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.tries = 0
        self.status = 200
        self.held = threading.Event()
        self.held.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.tries += 1
                if outer.status == 200:
                    outer.bodies.append(json.loads(body))
                outer.held.wait(60)
                self.send_response(outer.status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url = f"json://robot:s3cr3t-t0k3n@127.0.0.1:{port}/hook"
        self.ntfy = f"ntfy://127.0.0.1:{port}/corral-topic"

    @property
    def titles(self) -> list[str]:
        return [body["title"] for body in self.bodies]

    @property
    def references(self) -> list[str]:
        """The last line of each message, which names its cause."""
        return [body["message"].strip().splitlines()[-1] for body in self.bodies]


@contextmanager
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    threading.Thread(target=made.server.serve_forever, args=(0.05,), daemon=True).start()
    yield made
    made.held.set()
    made.server.shutdown()
    made.server.server_close()


class Mailbox:
    """Mails that the server has taken.

    Attributes:
        url: of Apprise.
        mails: parsed, in their order.
    """

    def __init__(self) -> None:
        self.mails: list[Message] = []
        self.url = ""

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802  # as aiosmtpd names it
        self.mails.append(message_from_bytes(envelope.content, policy=default))
        return "250 OK"


@contextmanager
def mail_server() -> Iterator[Mailbox]:
    box = Mailbox()
    loop = asyncio.new_event_loop()
    # The library's own controller takes no port of the system's choice.
    server = loop.run_until_complete(loop.create_server(lambda: SMTP(box, loop=loop), "127.0.0.1", 0))
    port = server.sockets[0].getsockname()[1]
    box.url = f"mailto://127.0.0.1:{port}?from=corral@fleet.example&to=ann@people.example&mode=insecure"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield box
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    server.close()
    loop.close()
