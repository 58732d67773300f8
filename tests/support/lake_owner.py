"""The owner of a part of a lake, with its rollups."""

from __future__ import annotations

from corral.processors.storage.lake import lake as lakes
from corral.processors.storage.lake.partition import PartRollups


class Owned(lakes.LakePart):
    """A part that this process owns, as `corral process` has it, but that rolls up when it is told to."""

    def __init__(self, lake: lakes.Lake, processor: str, part: str, stream: str = "") -> None:
        super().__init__(lake, processor, part)
        self.rollups = PartRollups(self)
        self.resume(stream or part, "made")

    def roll_up(self) -> None:
        """Write the rollups of all that is committed."""
        self.rollups.refresh(everything=True)

    def close(self) -> None:
        self.rollups.close()
        super().close()
