"""Plain elements with our own classes: a page is HTML, and NiceGUI keeps it in step with what it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlencode

from nicegui import ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement
from nicegui.events import GenericEventArguments

from .fleet import Trouble


def tag(name: str, /, classes: str = "", text: str | None = None, **attributes: Any) -> Any:
    """An element; `text` can be changed later with `set_text`. Attributes are named with `_` for `-`."""
    made: Element = TextElement(tag=name, text=text) if text is not None else ui.element(name)
    if classes:
        made.classes(classes)
    for key, value in attributes.items():
        if value is not None and value is not False:
            made.props[key.rstrip("_").replace("_", "-")] = value
    return made


def button(text: str, on_click: Callable[[], Any], classes: str = "", icon: str = "", **attributes: Any) -> Element:
    """A button of ours."""
    made = tag("button", f"btn {classes}", type="button", **attributes)
    with made:
        if icon:
            ui.icon(icon)
        if text:
            tag("span", text=text)
    made.on("click", on_click, [])
    return made


class Segments:
    """A row of choices of which one holds.

    Args:
        choices: value and word of each.
        chosen: the value that holds.
        on_choice: called with another one.
        label: for screen readers.
    """

    def __init__(
        self, choices: Sequence[tuple[str, str]], chosen: str, on_choice: Callable[[str], Any], label: str
    ) -> None:
        self._buttons: dict[str, Element] = {}
        self._then = on_choice
        with tag("div", "seg", role="group", aria_label=label):
            for value, word in choices:
                made = tag("button", "", word, type="button", data_value=value)
                made.on("click", lambda value=value: self.choose(value), [])
                self._buttons[value] = made
        self.show(chosen)

    def choose(self, value: str) -> Any:
        """Another one holds."""
        self.show(value)
        return self._then(value)

    def show(self, chosen: str) -> None:
        """Show which holds; none for a value that is not among them."""
        for value, made in self._buttons.items():
            made.classes(add="on") if value == chosen else made.classes(remove="on")
            made.props["aria-pressed"] = "true" if value == chosen else "false"


def search(value: str, on_change: Callable[[str], Any], placeholder: str, classes: str = "search") -> Element:
    """A field whose text is told once somebody pauses in typing."""
    made = tag("input", f"field {classes}", type="search", value=value, placeholder=placeholder, aria_label=placeholder)
    on_typing(made, lambda text: on_change(text[:256]))
    return made


def on_typing(field: Element, then: Callable[[str], Any], pause: float = 0.25) -> None:
    """Have the text of a field told while somebody types, every `pause` seconds at most and at the end."""

    def told(event: GenericEventArguments) -> Any:
        return then(str(event.args))

    field.on("input", told, js_handler="(event) => emit(event.target.value)", throttle=pause, leading_events=not pause)


def on_choice(field: Element, then: Callable[[str], Any]) -> None:
    """Have the choice of a select told."""

    def told(event: GenericEventArguments) -> Any:
        return then(str(event.args))

    field.on("change", told, js_handler="(event) => emit(event.target.value)")


_WRAPPED = 48
"""Texts that are longer are broken into lines."""


def table(
    heads: Iterable[str], rows: Iterable[Sequence[Any]], numeric: Iterable[int] = (), last_is_end: bool = False
) -> Element:
    """A table; a cell is a text, or a function that makes what stands in it."""
    heads, numbers = list(heads), set(numeric)
    wrap = tag("div", "table-wrap")
    with wrap, tag("table", "rows"):
        with tag("thead"), tag("tr"):
            for at, head in enumerate(heads):
                tag("th", "num" if at in numbers else "", head)
        with tag("tbody"):
            for row in rows:
                with tag("tr"):
                    for at, cell in enumerate(row):
                        end = last_is_end and at == len(heads) - 1
                        classes = "end" if end else "num" if at in numbers else ""
                        if callable(cell):
                            with tag("td", classes):
                                cell()
                        else:
                            words = str(cell)
                            tag("td", f"{classes} wrap" if len(words) > _WRAPPED else classes, words)
    return wrap


def empty(trouble: Trouble, slim: bool = False) -> None:
    """What stands where there is nothing to show: why, and what to do."""
    icons = {"bus": "cable", "planner": "hub", "history": "history", "devices": "memory"}
    with tag("div", "empty slim" if slim else "empty", role="status"):
        ui.icon(icons.get(trouble.kind, "inbox"))
        tag("h2", text=trouble.title)
        if trouble.detail:
            tag("p", text=trouble.detail)
        if trouble.commands:
            tag("pre", text="\n".join(trouble.commands))


def url(path: str, **query: Any) -> str:
    """A link of ours that leaves out what is empty."""
    kept = {name: value for name, value in query.items() if value not in (None, "", False)}
    return f"{path}?{urlencode(kept)}" if kept else path


def remember(path: str, **query: Any) -> None:
    """Put the state of a page into the browser's address, so that it can be shared."""
    ui.navigate.history.replace(url(path, **query))
