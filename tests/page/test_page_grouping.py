"""Layers are put together by where they stand, and in tables and maps of a size that people read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantload.page.grouping import MOST_CELLS, Place, by_module, heatmap, most_divergent, place_of
from reports import layer, layers_with_single_experts, plain_layers


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.5.self_attn.q_proj", ("model.layers", 5, "self_attn.q_proj")),
        ("model.layers.5.mlp.experts.17.up_proj", ("model.layers", 5, "mlp.experts.*.up_proj")),
        ("h.0.attn", ("h", 0, "attn")),
        ("lm_head", ("", None, "lm_head")),
        ("heads.0", ("", None, "heads.0")),
        ("", ("", None, "")),
    ],
)
def test_a_name_says_where_a_module_stands(name: str, place: tuple[str, int | None, str]) -> None:
    assert place_of(name) == Place(*place)


def test_a_map_has_a_row_for_each_depth_and_a_column_for_each_module() -> None:
    layers = [vars(each) for each in [*plain_layers(48), layer("lm_head", 30.0)]]
    map = heatmap(layers)
    assert map.rows == ["outside", *map_rows(48)]
    assert len(map.columns) == 6
    assert len(map.cells) == len(layers)
    assert map.depths_a_row == 1


def map_rows(depth: int) -> list[str]:
    return [str(each) for each in range(depth)]


def test_very_deep_models_share_rows_and_the_lowest_counts() -> None:
    layers = [vars(each) for each in plain_layers(1000)]
    layers[5 * 501]["sqnr_db"] = 3.0
    map = heatmap(layers)
    assert len(map.cells) <= MOST_CELLS
    assert sum(cell.layers for cell in map.cells.values()) == len(layers)
    worst = min(map.cells.values(), key=lambda cell: cell.lowest or 0.0)
    assert (worst.lowest, worst.worst) == (3.0, "model.layers.501.self_attn.q_proj")


def test_thirty_thousand_experts_become_a_few_rows_of_a_table() -> None:
    groups = by_module([vars(each) for each in layers_with_single_experts(30_000)])
    assert len(groups) == 3
    assert sum(group.layers for group in groups.values()) == 30_000


def test_two_towers_have_rows_of_their_own() -> None:
    map = heatmap([vars(layer(name)) for name in ("visual.blocks.1.qkv", "model.layers.1.q_proj")])
    assert map.rows == ["model.layers.1", "visual.blocks.1"]


@given(st.lists(st.tuples(st.text("ab.0159", max_size=30), st.none() | st.floats()), max_size=30))
def test_every_layer_is_in_exactly_one_cell(given: list[tuple[str, float | None]]) -> None:
    map = heatmap([vars(layer(name, sqnr)) for name, sqnr in given])
    assert sum(cell.layers for cell in map.cells.values()) == len(given)
    assert all(row < len(map.rows) and column < len(map.columns) for row, column in map.cells)


def test_of_depths_that_share_a_row_the_largest_divergence_counts() -> None:
    layers = [vars(each) for each in plain_layers(1000)]
    layers[5 * 501]["divergence"], layers[5 * 502]["divergence"] = 0.1, 0.2
    found = [cell for cell in heatmap(layers).cells.values() if cell.divergence is not None]
    assert max((cell.divergence, cell.most_divergent) for cell in found) == (0.2, "model.layers.502.self_attn.q_proj")
    assert [each["divergence"] for each in most_divergent(layers, 10)] == [0.2, 0.1]
