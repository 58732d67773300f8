"""Tables on narrow terminals: what is shortened, what is left out, and what is whole."""

from __future__ import annotations

import io

import hypothesis.strategies as st
from corral.cli import render
from corral.cli.fitting import Heading, fitted
from corral.schemas.operations import QueueEntry
from hypothesis import given
from rich.console import Console


@given(
    texts=st.lists(st.text("abcdefgh", min_size=1, max_size=60), min_size=3, max_size=3),
    number=st.integers(0, 10**6),
    width=st.integers(56, 200),
)
def test_a_narrow_table_never_shortens_numbers_and_ids(texts: list[str], number: int, width: int) -> None:
    headings = [
        Heading(title="OWNER", text=True, ample=16),
        Heading(title="NAME", text=True),
        Heading(title="WHY", text=True, last=1),
        Heading(title="GPUS", right=True),
        Heading(title="HEARD", right=True, spare=1),
        Heading(title="LEASE"),
    ]
    lease = "7a1f459190-da-1"
    console = Console(width=width, file=io.StringIO())
    console.print(fitted(headings, [[*texts, str(number), "17m", lease]], width))
    head, row = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(head.rstrip()) <= width
    assert len(row.rstrip()) <= width
    cells = row.split()
    assert cells[-1] == lease
    assert str(number) in cells
    assert texts[0].startswith(cells[0].rstrip("…"))
    assert len(cells[0]) >= min(len(texts[0]), 7)


def test_a_narrow_queue_says_who_waits_and_until_when() -> None:
    entry = QueueEntry(
        request_id="388fe52bb800421baa19f23ba14d7c20", owner="carol", name="patient", gpus=8, position=1,
        waiting_seconds=120, message="0/96 devices: 72 wrong model, 12 too few together (most on one host: 6 of 8)",
    )  # fmt: skip
    for width in (60, 80, 120):
        console = Console(width=width, file=io.StringIO())
        console.print(render.queue_table([entry], width))
        head, row = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
        assert len(row.rstrip()) <= width
        assert row.split()[:5] == ["1", "carol", "patient", "8", "2m"]
        # The beginning of its id is enough to withdraw it.
        assert "388fe52" in row
        assert "WHY" in head
        assert "STARTS IN" in head
