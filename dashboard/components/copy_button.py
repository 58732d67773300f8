"""Button that copies a text to the clipboard."""

from __future__ import annotations

from nicegui.element import Element

from . import LIBRARY


class CopyButton(Element, component="copy_button.js", esm=LIBRARY):
    """A button that copies a text in the browser.

    Args:
        text: text to copy.
        label: label of the button.
    """

    def __init__(self, text: str, label: str = "Copy") -> None:
        super().__init__()
        self._props["text"] = text
        self._props["label"] = label
