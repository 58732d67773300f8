"""Tables that fit the width of a terminal: less important columns are left out, and texts are shortened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct
from rich.table import Table
from rich.text import Text

_GAP: Final = 2
_SHORTEST: Final = 10
"""Width below which no text is shortened, in characters, as long as the table fits then."""
_NARROW: Final = 7
"""The same in a terminal that is too narrow for this."""


class Heading(Struct, frozen=True, kw_only=True):
    """A column of a table.

    Attributes:
        title: heading, with the unit of the values.
        right: align to the right, as for numbers.
        spare: columns with the highest value are left out first where there is too little room; 0 keeps a column.
        last: columns with the highest value are left out first where even shortened texts need too much room; 0 keeps a
            column.
        text: its values may be shortened. Numbers and ids never are: what is left of them would be wrong.
        ample: width, in characters, to which a text is shortened before another column is spared or shortened; 0 for
            all of it.
    """

    title: str
    right: bool = False
    spare: int = 0
    last: int = 0
    text: bool = False
    ample: int = 0


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
    ample = {at: min(room, headings[at].ample or room) for at, room in widths.items()}
    while _total(ample) > width and any(headings[at].spare for at in ample):
        del ample[max(ample, key=lambda at: headings[at].spare)]
    least = {at: min(widths[at], _NARROW) if headings[at].text else widths[at] for at in ample}
    while _total(least) > width and any(headings[at].last for at in least):
        del least[max(least, key=lambda at: headings[at].last)]
    widths = {at: widths[at] for at in least}
    for shortest in (
        {at: headings[at].ample or room for at, room in widths.items()},
        dict.fromkeys(widths, _SHORTEST),
        dict.fromkeys(widths, _NARROW),
    ):
        longer = [at for at in widths if headings[at].text and widths[at] > shortest[at]]
        while longer and (excess := _total(widths) - width) > 0:
            longest = max(longer, key=widths.__getitem__)
            widths[longest] = max(shortest[longest], widths[longest] - excess)
            longer.remove(longest)
    made = Table(box=None, header_style="bold dim", pad_edge=False, padding=(0, _GAP, 0, 0))
    for at, room in widths.items():
        heading = headings[at]
        justify = "right" if heading.right else "left"
        made.add_column(heading.title, justify=justify, no_wrap=True, overflow="ellipsis", width=room)
    for row in cells:
        made.add_row(*(row[at] for at in widths))
    return made


def facts(rows: Mapping[str, str]) -> Table:
    """A table of names and values, of which long ones go on in the next line.

    Args:
        rows: values by their names; plain texts.
    """
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, _GAP, 0, 0))
    made.add_column(style="dim", no_wrap=True, min_width=max(map(len, rows), default=0))
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(Text(name), Text(value))
    return made


def _total(widths: dict[int, int]) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)
