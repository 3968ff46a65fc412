"""The parity tables say what the golden outputs show, and no more than the tests hold."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import parity

TESTS = Path(__file__).resolve().parents[1]


def test_codes_and_scales_that_differ_are_counted() -> None:
    made = parity.Comparison("int8_per_channel", "vLLM", "0", "vectors")
    made.add(np.array([[1, 2, 3]]), np.array([[1, 2, 4]]), None)
    made.add_scales(np.array([[1.0], [2.0]]), np.array([[1.5], [3.0]]), np.array([[False], [True]]))
    assert made.row[4:6] == ("1 of 3 differ", "1 of 2 differ")
    assert "BF16" in made.row[6]


def test_negative_zero_and_the_scales_of_zeros_are_told() -> None:
    made = parity.Comparison("quark_mxfp4", "a tool", "0", "vectors")
    made.add(np.array([[8, 1]]), np.array([[0, 1]]), 8)
    made.add_scales(np.array([[0, 7]]), np.array([[1, 7]]), np.array([[True, False]]))
    assert made.row[4:6] == ("identical but for the sign of 0", "identical but where all is 0")


def test_every_vector_of_every_tool_is_in_the_table() -> None:
    rows = parity.comparisons()
    tools = set()
    for name in ("vectors", "vectors_mx", "vectors_int4"):
        with np.load(parity.DATA / f"{name}.npz") as stored:
            tools |= {key.split("|")[1].partition(":")[0] for key in stored.files if key.startswith(parity.SETS)}
    assert tools - {"in"} == set(parity.TOOLS["vectors"])
    named = {(each.tool, each.version) for each in rows}
    assert all(tuple(parity.TOOLS["vectors"][tool]) in named for tool in tools - {"in"})
    assert {each.codes for each in rows if each.source == "vectors" and each.scheme != "nvfp4"} == {3 * 16 * 256}
    assert all(each.furthest <= 1 for each in rows)


def test_what_is_read_to_the_same_values_is_what_the_tests_hold() -> None:
    source = ast.parse((TESTS / "schemes" / "test_stored_golden.py").read_text())
    held = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("FORMATS", "NOT_EXACT")
    }
    rows = {row[4].strip("`"): row for row in parity.stored_checkpoints()}
    assert {name: row[3].strip("`") for name, row in rows.items() if name != "ct_made"} == held["FORMATS"]
    assert {name for name, row in rows.items() if row[5] != "identical"} == held["NOT_EXACT"]
    assert "ct_made" in (TESTS / "schemes" / "test_stored_compressed_tensors.py").read_text()
