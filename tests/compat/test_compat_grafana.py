"""The dashboard is one by Grafana's own schema, as the classes have it that Grafana makes of that schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WHY = "grafana-foundation-sdk is not installed"
dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason=WHY)
encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder", reason=WHY)
plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins", reason=WHY)
prometheus = pytest.importorskip("grafana_foundation_sdk.models.prometheus", reason=WHY)

pytestmark = pytest.mark.compat
DASHBOARD = Path(__file__).parent.parent.parent / "deploy" / "grafana" / "quantload.json"


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Where something is not as it was given; what the schema adds with its defaults does not count."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept[key], f"{path}.{key}") if key in kept else (f"{path}.{key}",)
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}[{index}]")
    elif given != kept:
        yield path


def through_the_schema(given: dict[str, Any]) -> dict[str, Any]:
    plugins.register_default_plugins()
    read: dict[str, Any] = json.loads(encoder.JSONEncoder().encode(dashboard.Dashboard.from_json(given)))
    return read


def test_every_field_of_the_dashboard_is_one_of_the_schema() -> None:
    given = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert list(lost(given, through_the_schema(given))) == []
    panels = dashboard.Dashboard.from_json(given).panels
    assert panels
    assert all(isinstance(panel, dashboard.Panel) and panel.targets for panel in panels)
    assert all(isinstance(query, prometheus.Dataquery) for panel in panels for query in panel.targets)


def test_a_field_that_is_not_in_the_schema_is_found() -> None:
    given = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    given["panels"][0]["gridPos"]["widht"] = 3
    given["panels"][0]["fieldConfig"]["defaults"]["unti"] = "bytes"
    assert set(lost(given, through_the_schema(given))) == {
        ".panels[0].gridPos.widht", ".panels[0].fieldConfig.defaults.unti",
    }  # fmt: skip
