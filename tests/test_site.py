"""The documentation as a site: links lead to where the site has what they mean, references are made from the code."""

from __future__ import annotations

import dataclasses

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
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CheckpointError)
    ]
    assert len(kinds) > 5
    assert all(f"## {kind.__name__}\n" in site_pages.troubleshooting() for kind in kinds[:5])
    assert all(f".{name}\n" in site_pages.api_reference() for name in quantload.__all__)
