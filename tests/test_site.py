"""The documentation as a site: links lead to where the site has what they mean, references are made from the code."""

from __future__ import annotations

import dataclasses
import re

import pytest
import quantload
import site_pages
from quantload import errors
from quantload.memory.metrics import LoadMetrics
from quantload.memory.report import LoadReport


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
    assert "| `quantload_rank_bytes_read` | gauge | `rank` |" in metrics
    assert "| `quantload_requests_total` | counter | `route`, `status` |" in metrics
    assert all(f".{name}\n" in site_pages.api_reference() for name in quantload.__all__)


def test_every_error_is_in_the_list_of_what_to_do() -> None:
    own = (each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception))
    kinds = [*own, OSError, KeyboardInterrupt]
    assert len(kinds) > 20
    text = site_pages.troubleshooting()
    for kind in kinds:
        _, found, section = text.partition(f"\n## {kind.__name__}\n")
        assert found, kind
        assert re.search(r"Exit code \d+\.\n\n1\. .{20,}", section.partition("\n## ")[0]), kind


@pytest.mark.parametrize("name", site_pages.MADE)
def test_the_pages_that_are_made_from_the_code_are_up_to_date(name: str) -> None:
    stored = (site_pages.ROOT / "docs" / name).read_text(encoding="utf-8")
    assert site_pages.MADE[name]() == stored, "run: python .ci/site_pages.py"
