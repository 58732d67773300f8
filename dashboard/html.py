"""Plain HTML elements with the dashboard's CSS classes, kept up to date by NiceGUI."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlencode

from nicegui import ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement
from nicegui.events import GenericEventArguments

from .fleet import Problem


def tag(name: str, /, classes: str = "", text: str | None = None, **attributes: Any) -> Any:
    """Create an element; `text` can be changed later with `set_text`. In names of attributes, `_` stands for `-`."""
    made: Element = TextElement(tag=name, text=text) if text is not None else ui.element(name)
    if classes:
        made.classes(classes)
    for key, value in attributes.items():
        if value is not None and value is not False:
            made.props[key.rstrip("_").replace("_", "-")] = value
    return made


def button(text: str, on_click: Callable[[], Any], classes: str = "", icon: str = "", **attributes: Any) -> Element:
    """Create a button in the dashboard's style."""
    made = tag("button", f"btn {classes}", type="button", **attributes)
    with made:
        if icon:
            ui.icon(icon)
        if text:
            tag("span", text=text)
    made.on("click", on_click, [])
    return made


class Segments:
    """Segmented control: a row of choices, one of which is selected.

    Args:
        choices: value and label of each choice.
        chosen: value that is selected initially.
        on_choice: called with the value of a choice when it is clicked.
        label: label for screen readers.
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
        """Select a choice, and call `on_choice`."""
        self.show(value)
        return self._then(value)

    def show(self, chosen: str) -> None:
        """Show a choice as selected; none if the value isn't among the choices."""
        for value, made in self._buttons.items():
            made.classes(add="on") if value == chosen else made.classes(remove="on")
            made.props["aria-pressed"] = "true" if value == chosen else "false"


def search(value: str, on_change: Callable[[str], Any], placeholder: str, classes: str = "search") -> Element:
    """Create a search field; `on_change` gets its text, up to 256 characters, while the user types."""
    made = tag(
        "input", f"field {classes}", type="search", placeholder=placeholder, aria_label=placeholder,
        **initial_text(value),
    )  # fmt: skip
    on_typing(made, lambda text: on_change(text[:256]))
    return made


def initial_text(text: str) -> dict[str, str]:
    """Attribute for the text that a field has before anybody types."""
    # With `value`, each update of the page would put it back in place of what was typed meanwhile.
    return {"defaultValue": text}


def on_typing(field: Element, then: Callable[[str], Any], pause: float = 0.25) -> None:
    """Call `then` with the text of a field while the user types, at most every `pause` seconds, and at the end."""

    def changed(event: GenericEventArguments) -> Any:
        return then(str(event.args))

    field.on(
        "input", changed, js_handler="(event) => emit(event.target.value)", throttle=pause, leading_events=not pause
    )


def on_choice(field: Element, then: Callable[[str], Any]) -> None:
    """Call `then` with the value of a select element when it changes."""

    def changed(event: GenericEventArguments) -> Any:
        return then(str(event.args))

    field.on("change", changed, js_handler="(event) => emit(event.target.value)")


_WRAPPED = 48
"""Maximum length of a text in a cell without line breaks."""
_NAME = 20
"""The same of a name: a word without spaces, which may be broken anywhere."""


def table(
    heads: Iterable[str], rows: Iterable[Sequence[Any]], numeric: Iterable[int] = (), last_is_end: bool = False
) -> Element:
    """Create a table; a cell is a text, or a function that creates its content."""
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
                            broken = (
                                "wrap"
                                if len(words) > _WRAPPED and " " in words
                                else "name"
                                if len(words) > _NAME
                                else ""
                            )
                            tag("td", classes or broken, words)
    return wrap


def empty(problem: Problem, slim: bool = False) -> None:
    """Show a trouble as an empty state: the reason why there is nothing to show, and what to do."""
    icons = {"bus": "cable", "planner": "hub", "history": "history", "devices": "memory", "groups": "groups"}
    with tag("div", "empty slim" if slim else "empty", role="status"):
        ui.icon(icons.get(problem.kind, "inbox"))
        tag("h2", text=problem.title)
        if problem.detail:
            tag("p", text=problem.detail)
        if problem.commands:
            tag("pre", text="\n".join(problem.commands))


def url(path: str, **query: Any) -> str:
    """URL with a query string; empty parameters are left out."""
    kept = {name: value for name, value in query.items() if value not in (None, "", False)}
    return f"{path}?{urlencode(kept)}" if kept else path


def remember(path: str, **query: Any) -> None:
    """Put the state of a page into the browser's URL, so that it can be shared."""
    ui.navigate.history.replace(url(path, **query))
