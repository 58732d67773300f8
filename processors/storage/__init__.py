"""Where the history lies: tables, rollups, archive and snapshots. `Storage` says what ingest needs of it."""

from .database import Database
from .errors import StorageError, StoragePaused, Unstorable
from .interface import Batch, Storage
from .maintenance import Maintenance
from .retention import Retention

__all__ = ["Batch", "Database", "Maintenance", "Retention", "Storage", "StorageError", "StoragePaused", "Unstorable"]
