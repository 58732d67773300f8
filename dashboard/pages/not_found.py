"""Page for unknown URLs, with status 404."""

from __future__ import annotations

from collections.abc import Callable

from nicegui import ui
from starlette.requests import Request

from ..fleet import Problem
from ..html import empty, tag
from ..page_frame import Frame


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/{path:path}")
    async def page(request: Request, path: str) -> None:
        around = frame(request, "No such page")
        ui.context.client.status_code = 404
        with around.show(""), tag("section", "panel"):
            empty(Problem(kind="page", title="No such page", detail=f"There is no page /{path[:200]}."))
