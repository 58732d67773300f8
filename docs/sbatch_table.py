"""The tables of `#SBATCH` options and of Slurm's variables in docs/jobs.md, from those that `corral submit` reads."""

from __future__ import annotations

from pathlib import Path

from corral.cli.work.jobs.sbatch import INSTEAD, RULES, Rule

BEGIN = "<!-- sbatch: made by docs/generate.py -->"
END = "<!-- end of sbatch -->"


def fill(page: Path) -> str:
    """The page with its tables as the code has them.

    Raises:
        ValueError: the page has no place for them.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def tables() -> str:
    """Options that mean the same; those without an effect; those that are unknown; and variables."""
    same = [f"| {_name(rule)} | {_options(rule.corral)} | {rule.remark} |" for rule in RULES if rule.corral]
    harmless = [rule for rule in RULES if not rule.corral and rule.harmless]
    unknown = [rule for rule in RULES if not rule.corral and not rule.harmless]
    return "\n".join(
        [
            *("| `#SBATCH` | `corral submit` | |", "| --- | --- | --- |", *same, ""),
            *("| `#SBATCH` without an effect | why |", "| --- | --- |", *_by_remark(harmless), ""),
            *("| unknown `#SBATCH` | instead |", "| --- | --- |", *_by_remark(unknown), ""),
            *(
                "| of Slurm | here |",
                "| --- | --- |",
                *(f"| `{name}` | {_variable(to)} |" for name, to in INSTEAD.items()),
            ),
            "",
        ]
    )


def _name(rule: Rule) -> str:
    return f"`--{rule.long}`" + (f", `-{rule.short}`" if rule.short else "")


def _by_remark(rules: list[Rule]) -> list[str]:
    found: dict[str, list[str]] = {}
    for rule in rules:
        found.setdefault(rule.remark, []).append(_name(rule))
    return [f"| {', '.join(names)} | {_options(remark)} |" for remark, names in found.items()]


def _options(text: str) -> str:
    """A text with its options as code."""
    words = [
        f"`{word.rstrip(',')}`{',' * word.endswith(',')}" if word.startswith("--") else word for word in text.split()
    ]
    return " ".join(words)


def _variable(text: str) -> str:
    name, comma, rest = text.partition(",")
    return f"`{name}`{comma}{rest}" if name.startswith("$") else text
