"""The site as `make site` builds it: valid links, every page in the navigation, no network access."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import links  # noqa: E402

pytest.importorskip("zensical", reason="the development group is not installed")


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "site.py"), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        loads = re.findall(r'<(?:script|link|img|iframe)[^>]*?(?:src|href)="([^"]+)"', page.read_text())
        assert loads
        assert not [url for url in loads if "//" in url], page


def test_every_link_of_every_markdown_file_leads_somewhere() -> None:
    pages = links.pages()
    assert ROOT / "README.md" in pages
    assert [problem for page in pages for problem in links.problems(page)] == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# One `two`\n\n## Same\n\n## Same\n\n```\n# none\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](nope.md) ![b](nope.png) [c](other.md#nope) [d](other.md#none) `[e](in-code.md)`\n"
        "[f](other.md#one-two) [g](other.md#same-1) [h](https://example.invalid) [i](.) [j](../outside.md)\n"
        "```\n[k](in-a-block.md)\n```\n"
    )
    (tmp_path.parent / "outside.md").touch()
    found = [problem.split(": ")[1] for problem in links.problems(page)]
    assert found == ["nope.md", "nope.png", "other.md#nope", "other.md#none", "../outside.md"]
