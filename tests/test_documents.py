"""The README is short and leads to a list of all pages, and links in the documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("**/*.md") if path != DOCS / "README.md")
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "bench").glob("*.md")), DOCS / "README.md", *PAGES]
DOCUMENTS += [ROOT / "deploy" / "README.md"]
_LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]*)(?:#(?P<anchor>[^)]*))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document in links."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(text)}


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_list_of_pages_says_what_each_is_about(page: Path) -> None:
    name = re.escape(str(page.relative_to(DOCS)))
    assert re.search(rf"^- \[.+\]\({name}\): .+", (DOCS / "README.md").read_text(), re.MULTILINE)


def test_the_readme_leads_to_the_list_of_pages() -> None:
    assert re.search(r"^- \[docs/README.md\]\(docs/README.md\): .+", README.read_text(), re.MULTILINE)


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
