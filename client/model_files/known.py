"""Well-known models: their configurations, each with the published byte count that its sizes are checked against."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

KNOWN_FILE: Final = Path(__file__).parent / "known_models.json"


class KnownModel(Struct, frozen=True, kw_only=True):
    """A well-known model.

    Attributes:
        name: name for people.
        repository: its repository on Hugging Face, by which servers load it.
        source: where the byte count is published.
        total_bytes: bytes of its weights as published.
        config: what its `config.json` says of sizes.
    """

    name: str
    repository: str
    source: str
    total_bytes: int
    config: dict[str, Any]


@cache
def known_models() -> dict[str, KnownModel]:
    """Well-known models by name."""
    return {model.name: model for model in msgspec.json.decode(KNOWN_FILE.read_bytes(), type=list[KnownModel])}
