"""Patterns of names in messages, with what each allows in words."""

from __future__ import annotations

from typing import Final

# To Python `$` alone is also the place before a last line feed; JSON Schema has no `\Z`.
OWNER: Final = r"^[A-Za-z0-9_@-][A-Za-z0-9_@.:/+-]*$(?!\n)"
IDENTIFIER: Final = r"^[A-Za-z0-9_-]+$(?!\n)"
GROUP: Final = r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$(?!\n)"
JOB: Final = r"^[0-9]+$(?!\n)"
TARGET: Final = r"^[A-Za-z0-9_-]([A-Za-z0-9_@.:/+-]*[A-Za-z0-9_-])?$(?!\n)"
VERSION: Final = r"^[0-9]{1,3}(\.[0-9]{1,3})?$(?!\n)"

WORDS: Final = {
    OWNER: "a name of letters, digits and _ @ . : / + - (with none of . : / + first)",
    IDENTIFIER: "an id of letters, digits, - and _",
    GROUP: "the name of a group: letters, digits, _ . and -, with / between the levels, as in lab/vision",
    JOB: "the id of a job: a number, such as 1234",
    TARGET: "the name of a target: letters, digits and _ - (and @ . : / + within), as in ann-mail",
    VERSION: "a version, such as 8.0",
}
"""Description of the texts that match each pattern."""
