"""Storage of the history: tables, rollups, archive and snapshots. `Storage` is the protocol that ingest needs."""

from .embedded.database import Database
from .embedded.maintenance import Maintenance
from .errors import StorageError, StoragePaused, Unstorable
from .protocol import Batch, Storage
from .retention import Retention

__all__ = ["Batch", "Database", "Maintenance", "Retention", "Storage", "StorageError", "StoragePaused", "Unstorable"]
