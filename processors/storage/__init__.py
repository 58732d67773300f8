"""Where the history lies: tables, rollups, archive and snapshots. `Storage` says what ingest needs of it."""

from .database import Database
from .errors import StorageError, StoragePaused
from .interface import Batch, Storage

__all__ = ["Batch", "Database", "Storage", "StorageError", "StoragePaused"]
