"""The links of Markdown files: where they lead, and whether that is there.

usage: python docs/links.py

Looks at every Markdown file of the repository that git knows or would add. Links within the repository must lead to a
file that is there, and to a heading of it where they name one. Links elsewhere are not followed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]

_FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
LINK = re.compile(r"(?<!\\)(!?)\[((?:[^\[\]\\]|\\.|\[[^\[\]]*\])*)\]\(<?([^)<>\s]+)>?(?:\s+\"[^\"]*\")?\)")
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
_ID = re.compile(r"<a (?:id|name)=\"([^\"]+)\"|\{ ?#([\w-]+) ?\}")
_ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:|^//", re.I)


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines outside of fenced code, from 1, with spans of code blanked."""
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        found = _FENCE.match(line)
        if fence:
            if found and found[1].startswith(fence):
                fence = ""
            continue
        if found:
            fence = found[1]
            continue
        yield number, _CODE.sub(lambda match: " " * len(match[0]), line)


def blanked(text: str) -> str:
    """A page of the same length whose code is spaces: what is found in it is where it is in the page."""
    lines = [" " * len(line) for line in text.splitlines()]
    for number, line in prose(text):
        lines[number - 1] = line
    return "\n".join(lines)


def links(text: str) -> Iterator[tuple[int, str]]:
    """Line and target of every link and image."""
    plain = blanked(text)
    for match in LINK.finditer(plain):
        yield plain.count("\n", 0, match.start(3)) + 1, match[3]


def slug(heading: str) -> str:
    """A heading as the anchor that GitHub makes of it; sites made of the same file agree but for rare signs."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


@cache
def anchors(path: Path) -> frozenset[str]:
    """What a link may name behind `#` in a file."""
    found: dict[str, int] = {}
    text = path.read_text()
    names: set[str] = set()
    plain = text.splitlines()
    for number, _ in prose(text):
        line = plain[number - 1]
        names.update(match[1] or match[2] for match in _ID.finditer(line))
        if heading := _HEADING.match(line):
            name = slug(re.sub(r"\{ ?#[\w-]+ ?\}", "", heading[2]).strip())
            count = found.get(name, 0)
            found[name] = count + 1
            names.add(f"{name}-{count}" if count else name)
    return frozenset(names)


def target(page: Path, link: str) -> tuple[Path, str] | None:
    """The file and the anchor that a link of a page leads to; None for one that leads out of the repository."""
    if _ELSEWHERE.match(link):
        return None
    file, _, anchor = link.partition("#")
    return ((page.parent / unquote(file)).resolve() if file else page), anchor


def pages() -> list[Path]:
    """Every Markdown file of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted(path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file())


def problems(page: Path) -> Iterator[str]:
    """What is wrong with the links of a page."""
    for number, link in links(page.read_text()):
        where = target(page, link)
        if where is None:
            continue
        file, anchor = where
        name = f"{page.relative_to(ROOT)}:{number}: {link}"
        if not file.exists():
            yield f"{name}: there is no {file}"
        elif not file.is_relative_to(ROOT):
            yield f"{name}: leads out of the repository"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"{name}: no heading of {file.relative_to(ROOT)} is #{anchor}"


def main() -> int:
    """Print what is wrong; the exit code is 1 if anything is."""
    found = [problem for page in pages() for problem in problems(page)]
    print("\n".join(found) or f"the links of {len(pages())} files lead somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
