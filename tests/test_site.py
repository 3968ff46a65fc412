"""The documentation as a site: links lead to where the site has what they mean, references are made from the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import quantload
import site_pages
import typer.main
from quantload import cli, errors
from quantload.memory.metrics import LoadMetrics
from quantload.memory.report import LoadReport

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCKS = {path: re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE) for path in DOCUMENTS}
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("site", "written", "shown"),
    [
        ("index.md", "[m](docs/memory.md#a)", "[m](memory.md#a)"),
        ("server.md", "[b](../bench/README.md#x) [c](../CONTRIBUTING.md)", "[b](bench.md#x) [c](contributing.md)"),
        ("load-page/README.md", "![p](dark.png)", "![p](dark.png)"),
        ("deploy.md", "[p](../docs/load-page/README.md)", "[p](load-page/README.md)"),
        ("index.md", "[LICENSE](LICENSE)", "`LICENSE`"),
        ("index.md", "[the code](loader/load.py)", "the code (`loader/load.py`)"),
        ("index.md", "[w](https://a.b/c.md) [h](#here)", "[w](https://a.b/c.md) [h](#here)"),
        ("index.md", "```\n[m](docs/memory.md)\n```\n", "```\n[m](docs/memory.md)\n```\n"),
    ],
)
def test_links_lead_to_where_the_site_has_what_they_mean(site: str, written: str, shown: str) -> None:
    assert site_pages.with_site_links(written, site) == shown


def test_references_have_everything_that_there_is() -> None:
    report = site_pages.report_reference()
    assert all(f"| `{field.name}` |" in report for field in dataclasses.fields(LoadReport))
    metrics = site_pages.metrics_reference()
    assert all(f"`{family.name}" in metrics for family in LoadMetrics().collect())
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CheckpointError)
    ]
    assert len(kinds) > 5
    assert all(f"## {kind.__name__}\n" in site_pages.troubleshooting() for kind in kinds[:5])
    assert all(f".{name}\n" in site_pages.api_reference() for name in quantload.__all__)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_that_are_shown_have_the_options_that_there_are(document: Path) -> None:
    lines = "\n".join(BLOCKS[document]).replace("\\\n", " ").splitlines()
    for line in lines:
        found = re.search(r"(?:^|[ /])quantload (?P<command>[a-z]+)(?P<rest> .*)?$", line)
        if found is None or found["command"] not in COMMANDS:
            continue
        options = {name for parameter in COMMANDS[found["command"]].params for name in parameter.opts}
        used = set(re.findall(r"(?<= )--?[a-z][a-z-]*", (found["rest"] or "").partition("  #")[0]))
        assert used <= options | {"--help", "-h"}, line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_that_is_shown_compiles_and_imports_what_there_is(document: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
        compile(block, str(document), "exec")
        for line in re.findall(r"^from quantload import [\w, ]+$", block, re.MULTILINE):
            exec(line, {})
