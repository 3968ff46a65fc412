"""The drawing in docs/memory.md is that of the newest result, and needs nothing but itself."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import memory_drawing
from result_files import newest


def test_the_drawing_is_what_the_newest_result_gives() -> None:
    result = newest("bigger_than_memory")
    assert result is not None
    assert memory_drawing.draw(result) == memory_drawing.FILE.read_text(), "run: python bench/all.py --tables-only"


def test_it_is_drawn_to_scale_says_what_it_shows_and_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "memory.svg"
    assert memory_drawing.write(path) == [path]
    assert memory_drawing.write(path) == []
    root, text = ET.fromstring(path.read_text()), path.read_text()
    name = "{http://www.w3.org/2000/svg}"
    bars = [each for each in root.iter(f"{name}rect") if float(each.get("y", 0)) in range(1, 200)]
    stored, model, peak, _ = (float(each.get("width", 0)) for each in bars)
    assert model < peak < stored / 3
    assert root.find(f"{name}title") is not None
    assert "prefers-color-scheme: dark" in text
    assert not any(word in text for word in ("<script", "href", "url(", "@import"))
    assert memory_drawing.write(path, tmp_path) == []
