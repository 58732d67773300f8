"""Files of a lake in object storage: `s3://bucket/prefix`, on AWS or on any server that speaks its protocol.

Credentials come from the environment, by the names that every S3 client uses. DuckDB keeps them in memory as a secret
that is used for the lake's prefix only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from ..errors import StorageError
from ..schema import sql_text

SECRET: Final = "corral_lake"


def is_url(data: str) -> bool:
    """True if the files are behind a URL, and not in a folder."""
    return "://" in data


def secret(data: str, environment: Mapping[str, str] = os.environ) -> str:
    """Statement that creates the secret with which an instance reaches the files.

    Args:
        data: URL of the files, `s3://bucket/prefix`.
        environment: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, and
            `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` where it is not Amazon's.

    Raises:
        StorageError: it is no such URL, or a key is missing; the message says what to do.
    """
    parts = urlsplit(data)
    if parts.scheme != "s3" or not parts.netloc or not parts.path.strip("/"):
        raise StorageError(f"{data}: the files of a lake lie in a folder, or in s3://bucket/prefix")
    key, hidden = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
    if not key or not hidden:
        raise StorageError(
            f"{data}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL where it is not Amazon's) "
            "to keys that may read, write, list and delete there"
        )
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
    options = {"KEY_ID": key, "SECRET": hidden, "REGION": region, "SCOPE": data}
    if token := environment.get("AWS_SESSION_TOKEN"):
        options["SESSION_TOKEN"] = token
    plain = False
    if endpoint := environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL"):
        found = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        plain = found.scheme == "http"
        # Servers of one's own seldom have a host name for each bucket.
        options |= {"ENDPOINT": found.netloc + found.path.rstrip("/"), "URL_STYLE": "path"}
    settings = ", ".join(f"{name} {sql_text(value)}" for name, value in options.items())
    return f"CREATE OR REPLACE SECRET {SECRET} (TYPE s3, {settings}, USE_SSL {'false' if plain else 'true'})"
