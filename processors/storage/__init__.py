"""Where the history lies: tables, rollups, archive and snapshots. `Storage` says what ingest needs of it."""

from .embedded.database import Database
from .embedded.maintenance import Maintenance
from .errors import StorageError, StoragePaused, Unstorable
from .protocol import Batch, Storage
from .retention import Retention

__all__ = ["Batch", "Database", "Maintenance", "Retention", "Storage", "StorageError", "StoragePaused", "Unstorable"]
