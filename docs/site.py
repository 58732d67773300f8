"""Build the documentation as a site of plain files that need no network.

usage: python docs/site.py [FOLDER]

FOLDER is `build/site` by default. Pages are the Markdown files of `docs/` and of the repository's top level; their
order is the `nav` of `docs/zensical.toml`. Ends with code 1 where a link leads nowhere, a page is not in the nav, or
the builder warns.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import links

DOCS = Path(__file__).parent
ROOT = DOCS.parent
CONFIG = DOCS / "zensical.toml"
TOP_LEVEL = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "README.md": "index.md",
    "SECURITY.md": "vulnerabilities.md",
}
"""Pages that stay at the top of the repository, where people look for them, and their names on the site."""


def places() -> dict[Path, str]:
    """Every page of the site by its file, with its place on the site."""
    found = {ROOT / name: place for name, place in TOP_LEVEL.items()}
    for page in links.pages():
        if page.is_relative_to(DOCS):
            found[page] = page.relative_to(DOCS).as_posix()
    return found


def navigation(entries: object) -> Iterator[str]:
    """The pages that a nav names."""
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, list):
        for entry in entries:
            yield from navigation(entry)
    elif isinstance(entries, dict):
        for entry in entries.values():
            yield from navigation(entry)


def assemble(folder: Path) -> Iterator[str]:
    """Write the pages and what they link to into a folder, with their links as the site has them.

    Yields:
        What is wrong, in words.
    """
    at = places()
    assets: dict[Path, str] = {}

    def relative(place: str, other: str) -> str:
        return os.path.relpath(other, os.path.dirname(place) or ".")

    for page, place in at.items():
        yield from links.problems(page)

        text = "\n".join(page.read_text().splitlines())
        for match in reversed(list(links.LINK.finditer(links.blanked(text)))):
            where = links.target(page, match[3])
            if where is None or not where[0].exists():
                continue
            file, anchor = where
            if file.is_dir():
                text = text[: match.start()] + text[match.start(2) : match.end(2)] + text[match.end() :]
                continue
            if file not in at and file not in assets:
                inside = file.is_relative_to(DOCS)
                assets[file] = file.relative_to(DOCS).as_posix() if inside else f"files/{file.relative_to(ROOT)}"
            new = relative(place, at.get(file) or assets[file])
            text = text[: match.start(3)] + new + ("#" + anchor if anchor else "") + text[match.end(3) :]
        written = folder / place
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(text + "\n")
    for file, place in assets.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / place)
    named = list(navigation(tomllib.loads(CONFIG.read_text())["project"]["nav"]))
    for place in sorted(set(at.values()) - set(named)):
        yield f"{place} is not in the nav of docs/zensical.toml"
    for place in sorted(set(named) - set(at.values())):
        yield f"the nav of docs/zensical.toml names {place}, which is not there"


def main() -> int:
    """Build; the exit code is 1 where anything is wrong."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").absolute()
    work = site.with_name(site.name + ".work")
    shutil.rmtree(work, ignore_errors=True)
    wrong = list(assemble(work / "docs"))
    if wrong:
        print("\n".join(wrong))
        return 1
    shutil.copyfile(CONFIG, work / "zensical.toml")
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=work, capture_output=True, text=True, check=False
    )
    if built.returncode:
        print(re.sub(r"\x1b\[[0-9;]*m", "", built.stdout + built.stderr.partition("Traceback")[0]))
        return 1
    shutil.rmtree(site, ignore_errors=True)
    (work / "site").rename(site)
    shutil.rmtree(work)
    print(f"{sum(1 for _ in site.rglob('*.html'))} pages: {site / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
