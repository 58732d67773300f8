"""Drawings that thousands of devices fit in: Vue components that take bytes and paint canvases."""

from __future__ import annotations

from pathlib import Path
from typing import Final

LIBRARY: Final = {"corral-ui": str(Path(__file__).parent / "lib")}
"""What they share, as an ES module."""
