"""Errors of the storage; their messages say what to do."""

from __future__ import annotations

from typing import Final

NOT_A_VALUE: Final = (OverflowError, TypeError, ValueError)
"""Errors of Python and Arrow for a value that fits no column: caused by the batch, not by the database."""


class StorageError(RuntimeError):
    """The database can't be used as it is; the message says why and what to do."""


class Unstorable(StorageError):
    """The database refuses a value of the batch, and would refuse it again."""


class StorageDamaged(StorageError):
    """The database's file is damaged; the next start puts it aside and rebuilds it (`recovery.py`)."""


class StoragePaused(RuntimeError):
    """Nothing can be stored at the moment (a full disk, say); it is worth trying again."""


class Deposed(RuntimeError):
    """Another processor owns this part of the stream by now; nothing was stored."""
