"""The README is short and lists the documentation, and links in the documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "bench").glob("*.md")), *PAGES]
DOCUMENTS += [*sorted((ROOT / "docs").glob("*/*.md")), ROOT / "deploy" / "README.md"]
_LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]*)(?:#(?P<anchor>[^)]*))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document in links."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(text)}


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_readme_says_what_each_page_is_about(page: Path) -> None:
    name = f"docs/{page.name}"
    assert re.search(rf"^- \[{re.escape(name)}\]\({re.escape(name)}\): .+", README.read_text(), re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_links_lead_somewhere(document: Path) -> None:
    for link in _LINK.finditer(document.read_text()):
        target = (document.parent / link["path"]).resolve() if link["path"] else document
        assert target.exists(), link[0]
        if link["anchor"]:
            assert link["anchor"] in anchors(target), link[0]


def test_a_heading_becomes_an_anchor(tmp_path: Path) -> None:
    document = tmp_path / "d.md"
    document.write_text("# When `CPU` kernels are compiled\n```\n# a comment\n```\n## torch.compile\n")
    assert anchors(document) == {"when-cpu-kernels-are-compiled", "torchcompile"}
