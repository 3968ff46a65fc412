"""The tables of the documents are what the results render, and goals, result files and markers do what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_tables
import load_tables
import parity
import pytest
import tables
from goals import at_least, at_most
from markdown import fill, goal_table, markdown
from result_files import newest, results_of, write_result

MACHINE = {
    "date": "2026-01-02T03:04:05+00:00",
    "cpu": "C",
    "vector_instructions": ["avx2"],
    "cores": 2,
    "memory_bytes": 24 << 30,
    "kernel": "Linux 6",
    "load_average": [0.1, 0.1, 0.1],
    "libraries": {"python": "3.11"},
}


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_documents_are_what_the_results_render(document: Path) -> None:
    assert tables.rendered(document) == document.read_text(), "run: python bench/all.py --tables-only"


def test_every_table_has_its_place() -> None:
    text = "".join(document.read_text() for document in tables.DOCUMENTS)
    for name in (*tables.render_all(), *tables.render_support(), *parity.render()):
        assert text.count(f"<!-- table: {name} -->") == 1


def test_a_goal_says_by_how_far_it_was_missed() -> None:
    assert at_least("g", "s", 9.0, 12, " GB/s").reached == "9.00 GB/s, 25.0% short"
    assert at_least("g", "s", 12.0, 12, " GB/s").met is True
    assert at_most("g", "s", 3.3, 3, " s").reached == "3.30 s, 10.0% over"
    assert at_most("g", "s", 3.0, 3, " s").met is True
    assert at_most("g", "s", None, 3, " s").met is None
    assert "| g | s | missed | 3.30 s, 10.0% over |" in goal_table([at_most("g", "s", 3.3, 3, " s")])


def test_only_what_stands_between_markers_is_replaced() -> None:
    text = "a\n<!-- table: one -->\nold\n<!-- /table -->\nb <!-- /table -->\n"
    filled = fill(text, {"one": "new"})
    assert filled == "a\n<!-- table: one -->\n\nnew\n\n<!-- /table -->\nb <!-- /table -->\n"
    assert fill(filled, {"one": "new"}) == filled
    with pytest.raises(KeyError, match="no table 'one'"):
        fill(text, {"two": "x"})


def test_a_table_has_a_line_a_row() -> None:
    assert markdown([["a", "1"]], ("x", "y")).splitlines() == ["| x | y |", "| --- | ---: |", "| a | 1 |"]


def test_results_are_never_overwritten_and_reduced_ones_left_out(tmp_path: Path) -> None:
    later = {**MACHINE, "date": "2026-01-02T09:00:00+00:00"}
    first = write_result("b", {"machine": later, "n": 1}, tmp_path)
    second = write_result("b", {"machine": MACHINE, "n": 2}, tmp_path)
    reduced = write_result("b", {"machine": later, "n": 3}, tmp_path, "part")
    other = write_result("b_other", {"machine": later, "n": 4}, tmp_path)
    assert len({first, second, reduced, other}) == 4
    assert [result["n"] for result in results_of("b", tmp_path)] == [1, 2]
    found = newest("b", tmp_path)
    assert found is not None
    assert found["file"] == first.name
    assert newest("nothing", tmp_path) is None


def load_result(file: str, *loaders: str, cold: bool = False, seconds: float = 1.0) -> dict[str, Any]:
    rows = [
        {
            "checkpoint": "dense",
            "loader": loader,
            "cold": cold,
            "status": "ok",
            "detail": "",
            "runs": 1,
            "seconds": seconds,
            "checkpoint_bytes": 15_000_000_000,
            "linear_share": 1.0,
            "bytes_per_second": 1.0,
        }
        for loader in loaders
    ]
    return {"machine": MACHINE, "rows": rows, "file": file}


def test_each_load_table_takes_the_newest_run_that_has_it() -> None:
    results = [
        load_result("newest.json", "read-only", "quark_mxfp4"),
        load_result("peers.json", "quark_mxfp4", "torchao-mxfp4"),
        load_result("cold.json", "read-only", "quark_mxfp4", cold=True),
    ]
    warm, cold, peers = load_tables.warm(results), load_tables.cold(results), load_tables.peers(results)
    assert "newest.json" in warm
    assert "| quark_mxfp4: >= 12 GB/s | dense | met | 15.00 GB/s |" in warm
    assert "cold.json" in cold
    assert "| met | 1.00x |" in cold
    assert "peers.json" in peers
    assert "torchao-mxfp4" not in warm
    assert "| missed | 1.0x (torchao-mxfp4) |" in peers
    assert load_tables.warm([]) == ""


def test_the_summary_has_what_was_measured_on_both_checkpoints() -> None:
    dense = load_result("dense.json", "read-only", "quark_mxfp4", "none", "bitsandbytes-nf4", "torchao-mxfp4")
    moe = load_result("moe.json", "read-only", "quark_mxfp4", "bitsandbytes-nf4", "torchao-mxfp4-experts", seconds=2.0)
    for row in moe["rows"]:
        row.update(checkpoint="moe", final_bytes=1_500_000_000, expert_share=1.0)
    dense["rows"][2]["seconds"] = 9.0
    dense["rows"][4]["seconds"] = 0.5
    found = load_tables.summary([dense, moe]).splitlines()
    assert [line.split(" |")[0] for line in found[2:5]] == [
        "| torchao-mxfp4", "| **quantload `quark_mxfp4`**", "| bitsandbytes-nf4",
    ]  # fmt: skip
    assert found[3] == "| **quantload `quark_mxfp4`** | 4 | 1.00 | - | - | 2.00 | 1.50 | - | 100% |"
    assert found[-1].endswith("(`dense.json`); MoE: `moe.json`")
    assert load_tables.summary([dense]) == ""


def test_without_results_a_table_says_so(tmp_path: Path) -> None:
    found = tables.render_all(tmp_path)
    assert {name for name, text in found.items() if text == gpu_tables.NOT_RUN} == {"gpu", "gpu_goals"}
    assert set(found.values()) == {tables.MISSING, gpu_tables.NOT_RUN}


def test_a_place_is_filled_from_another_folder(tmp_path: Path) -> None:
    document = tmp_path / "d.md"
    document.write_text("<!-- table: profile -->\n<!-- /table -->\n")
    result = {"machine": MACHINE, "checkpoint": "dense", "seconds": [0.5], "stages": {"reading": 0.3}, "parts": {}}
    (tmp_path / "profile_load-2026-01-02.json").write_text(json.dumps(result))
    assert tables.write((document,), tmp_path) == [document]
    assert "| reading | 0.300 | 100% |" in document.read_text()
    assert tables.write((document,), tmp_path) == []
