"""Corral: GPU fleet telemetry, history and placement on one message bus. `corral.client` is for programs.

In Jupyter and IPython, `%load_ext corral` adds the magic `%%gpu`.
"""

from __future__ import annotations

from typing import Any


def load_ipython_extension(ipython: Any) -> None:
    """Register the magics and the HTML tables with IPython; called by `%load_ext corral`."""
    from .client.notebook_magics import load_ipython_extension as load

    load(ipython)
