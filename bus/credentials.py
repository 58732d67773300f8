"""Identity on the bus: credentials files, certificates, and the facts that a file states about its holder.

A credentials file of Corral is an NKey seed behind comment lines, so that every NATS client reads it (`nats --nkey`):

    # user: alice
    # role: requester
    # owner: alice
    # inbox: _INBOX.alice
    # ca: ca.crt
    SUA…

The server knows the seed's public key and its permissions; the comments only save the holder from typing options. A
file with a JWT, as `nsc` writes them, is used as it is.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from pathlib import Path
from typing import Any, Final

from msgspec import Struct
from nats.errors import Error as NatsError

from .connection import Connection

CREDENTIALS_VARIABLE: Final = "CORRAL_NATS_CREDS"
CA_VARIABLE: Final = "CORRAL_NATS_CA"
CERTIFICATE_VARIABLE: Final = "CORRAL_NATS_CERT"
KEY_VARIABLE: Final = "CORRAL_NATS_KEY"
INBOX_VARIABLE: Final = "CORRAL_INBOX_PREFIX"

ANY_OWNER: Final = "*"
"""Owner of credentials that may make requests under any name, such as a portal's that makes them for others."""

_FACT: Final = re.compile(r"#\s*(user|role|owner|service|inbox|ca|cert|key|expires|login):\s*(\S.*?)\s*$")
_SEED: Final = re.compile(r"\s*(SU[A-Z2-7]{56})\s*$")
_JWT: Final = "BEGIN NATS USER JWT"


class CredentialsError(ValueError):
    """Credentials can't be used; the message says which file, why, and what to do."""


class Identity(Struct, frozen=True, kw_only=True):
    """Identity of a client, as far as it is known.

    Attributes:
        user: name of the user; empty if unknown.
        role: such as `requester`; empty if unknown.
        owner: name that devices may be requested under; `*` for any, empty if unknown or none.
        serves: true for an exporter, a dashboard or a login service that the bus lets answer requests.
        inbox: prefix of the subjects that answers come to; empty for the default.
        file: path of the credentials file; empty if none.
        seed: NKey seed; empty if the file holds a JWT.
        ca: path of the certificate that the server's must be signed by; empty if none.
        certificate: path of the client certificate, for mutual TLS; empty if none.
        key: path of its key.
        expires: end of a login for a time, RFC 3339; empty for credentials that stay.
        login: URL of the service that the login is from; empty for none.
    """

    user: str = ""
    role: str = ""
    owner: str = ""
    serves: bool = False
    inbox: str = ""
    file: str = ""
    seed: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""
    expires: str = ""
    login: str = ""

    def __repr__(self) -> str:
        """Omit the seed, which must not get into a log."""
        return f"Identity(user={self.user!r}, role={self.role!r}, owner={self.owner!r}, file={self.file!r})"


def identify(
    credentials: str | None = None,
    *,
    ca: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
    inbox: str | None = None,
) -> Identity:
    """Determine the identity from the arguments, else the environment; comments in the credentials file fill the gaps.

    Args:
        credentials: path of a credentials file; `CORRAL_NATS_CREDS` by default.
        ca: path of a CA's certificate; `CORRAL_NATS_CA`, then what the credentials file names, in its folder.
        certificate: path of the client certificate; `CORRAL_NATS_CERT`, then as above.
        key: path of its key; `CORRAL_NATS_KEY`, then as above.
        inbox: prefix for answers; `CORRAL_INBOX_PREFIX`, then as above.

    Raises:
        CredentialsError: the credentials file is missing, or is no credentials file.
    """

    def given(value: str | None, variable: str) -> str:
        return value or os.environ.get(variable, "").strip()

    facts: dict[str, str] = {}
    seed = ""
    file = given(credentials, CREDENTIALS_VARIABLE)
    if file:
        facts, seed = read(Path(file))
    return Identity(
        user=facts.get("user", ""),
        role=facts.get("role", ""),
        owner=facts.get("owner", ""),
        serves=facts.get("service") == "yes",
        inbox=given(inbox, INBOX_VARIABLE) or facts.get("inbox", ""),
        file=file,
        seed=seed,
        ca=given(ca, CA_VARIABLE) or facts.get("ca", ""),
        certificate=given(certificate, CERTIFICATE_VARIABLE) or facts.get("cert", ""),
        key=given(key, KEY_VARIABLE) or facts.get("key", ""),
        expires=facts.get("expires", ""),
        login=facts.get("login", ""),
    )


def read(path: Path) -> tuple[dict[str, str], str]:
    """Read the facts about its holder and the seed from a credentials file; both are empty for a JWT.

    Raises:
        CredentialsError: it is missing, or holds neither.
    """
    try:
        lines = path.expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise CredentialsError(f"the credentials file {path} can't be read: {why}") from None
    facts: dict[str, str] = {}
    seed = ""
    for line in lines:
        if found := _FACT.match(line):
            facts[found[1]] = found[2]
        elif found := _SEED.match(line):
            seed = seed or found[1]
        elif _JWT in line:
            return {}, ""
    if not seed:
        raise CredentialsError(f"{path} is no credentials file: it has neither an NKey seed nor a JWT in it")
    for name in ("ca", "cert", "key"):
        if name in facts:
            facts[name] = str(path.expanduser().absolute().parent / facts[name])
    return facts, seed


def options(identity: Identity) -> dict[str, Any]:
    """Arguments for `nats.connect`: credentials, inbox prefix and TLS context.

    With TLS it also silences a false warning of asyncio (see `_no_eof`).

    Raises:
        CredentialsError: a certificate can't be read.
    """
    found: dict[str, Any] = {}
    if identity.seed:
        found["nkeys_seed_str"] = identity.seed
    elif identity.file:
        found["user_credentials"] = identity.file
    if identity.inbox:
        found["inbox_prefix"] = identity.inbox
    if identity.ca:
        found["tls"] = _trust(identity)
        logging.getLogger("asyncio").addFilter(_no_eof)
    return found


def _no_eof(record: logging.LogRecord) -> bool:
    """Filter out asyncio's warning at the end of each TLS connection: its stream protocol does not know of TLS."""
    return "eof_received() has no effect when using ssl" not in record.getMessage()


def _trust(identity: Identity) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=identity.ca)
        if identity.certificate:
            context.load_cert_chain(identity.certificate, identity.key or None)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(path for path in (identity.ca, identity.certificate, identity.key) if path)
        why = error.strerror if isinstance(error, FileNotFoundError) else str(error)
        raise CredentialsError(
            f"a certificate of the bus can't be used ({files}): {why}. Keep ca.crt next to the credentials file, or "
            f"name it in {CA_VARIABLE}"
        ) from None
    return context


class TlsClient(Connection):
    """Client that refuses servers without TLS: a man in the middle could claim that the server has none."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # The only hook between the server's INFO and the client's first message.
        if initial_connection and not info.get("tls_required"):
            raise NatsError("nats: a CA is given for this server, but it does not speak TLS")
        await super()._process_info(info, initial_connection)
