"""Tables that fit the width of a terminal: less important columns are left out, and texts are shortened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct
from rich.table import Table
from rich.text import Text

_GAP: Final = 2
_SHORTEST: Final = 10
"""Width below which no text is shortened, in characters."""


class Heading(Struct, frozen=True, kw_only=True):
    """A column of a table.

    Attributes:
        title: heading, with the unit of the values.
        right: align to the right, as for numbers.
        spare: columns with the highest value are left out first where there is too little room; 0 keeps a column.
        text: its values may be shortened.
    """

    title: str
    right: bool = False
    spare: int = 0
    text: bool = False


def fitted(headings: Sequence[Heading], rows: Iterable[Sequence[Text | str]], width: int) -> Table:
    """An unboxed table of plain texts that is no wider than `width` characters, if that is possible.

    Args:
        headings: the columns.
        rows: a cell for each column; texts are not markup.
        width: of the terminal.
    """
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    widths = {
        at: max(len(heading.title), *(row[at].cell_len for row in cells)) if cells else len(heading.title)
        for at, heading in enumerate(headings)
    }
    while _total(widths) > width and any(headings[at].spare for at in widths):
        del widths[max(widths, key=lambda at: headings[at].spare)]
    while (excess := _total(widths) - width) > 0:
        longest = max((at for at in widths if headings[at].text), key=widths.__getitem__, default=None)
        if longest is None or widths[longest] <= _SHORTEST:
            break
        widths[longest] = max(_SHORTEST, widths[longest] - excess)
    made = Table(box=None, header_style="bold dim", pad_edge=False, padding=(0, _GAP, 0, 0))
    for at, room in widths.items():
        heading = headings[at]
        justify = "right" if heading.right else "left"
        made.add_column(heading.title, justify=justify, no_wrap=True, overflow="ellipsis", width=room)
    for row in cells:
        made.add_row(*(row[at] for at in widths))
    return made


def _total(widths: dict[int, int]) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)
