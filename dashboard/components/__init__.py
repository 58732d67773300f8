"""Vue components that draw thousands of devices or rows on canvases, from packed bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

LIBRARY: Final = {"corral-ui": str(Path(__file__).parent / "lib")}
"""ES module with code that the components share."""
