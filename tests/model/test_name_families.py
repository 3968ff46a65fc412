"""What is learned from a few names of a family must hold for all of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
from quantload.model.name_families import Renamed, families, rename_family

EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
    for layer, expert, name in itertools.product(range(12), range(16), ("gate_proj", "up_proj"))
]


class Everything:
    """A container of all names but those given."""

    def __init__(self, *unknown: str) -> None:
        self.unknown = unknown

    def __contains__(self, name: object) -> bool:
        return name not in self.unknown


def fuse(name: str) -> Renamed:
    renamed, count = re.subn(r"\.experts\.\d+\.(gate|up)_proj\.weight", ".experts.gate_up_proj", name)
    return renamed, "experts.*.gate_proj" if count else None


def shift(name: str) -> Renamed:
    return re.sub(r"layers\.(\d+)", lambda m: f"blocks.{int(m[1]) + 1}", name), None


def swap(name: str) -> Renamed:
    return re.sub(r"layers\.(\d+)(.*)experts\.(\d+)", r"experts.\3\2layers.\1", name), None


def one_layer_elsewhere(name: str) -> Renamed:
    return name.replace("model.layers.11.", "mtp.layers.0."), None


def one_expert_elsewhere(name: str) -> Renamed:
    return name, "shared" if ".experts.15." in name else None


def both_numbers_at_once(name: str) -> Renamed:
    return re.sub(r"layers\.(\d+)\.mlp\.experts\.(\d+)", lambda m: f"units.{int(m[1]) * 16 + int(m[2])}", name), None


@pytest.mark.parametrize(
    "rename",
    [fuse, shift, swap, one_layer_elsewhere, one_expert_elsewhere, both_numbers_at_once, lambda name: (name, None)],
    ids=lambda rename: rename.__name__,
)
@pytest.mark.parametrize("names", [EXPERTS, EXPERTS[::-1], EXPERTS[5::7]], ids=["all", "reversed", "some"])
def test_every_name_becomes_what_it_would_become_alone(rename: Callable[[str], Renamed], names: list[str]) -> None:
    found = dict(pair for members in families(names) for pair in rename_family(members, rename, Everything()))
    assert found == {name: rename(name) for name in names}


def test_few_names_are_asked_about() -> None:
    asked: list[str] = []

    def counting(name: str) -> Renamed:
        asked.append(name)
        return fuse(name)

    groups = families(EXPERTS)
    assert len(groups) == 2
    for members in groups:
        list(rename_family(members, counting, Everything()))
    assert len(asked) == 2 * (12 + 16 - 1)


def test_a_new_name_that_is_not_known_is_asked_about() -> None:
    exception = "model.layers.3.mlp.experts.7.up_proj.weight"

    def rename(name: str) -> Renamed:
        return ("kept", None) if name == exception else shift(name)

    known = Everything(shift(exception)[0])
    found = dict(pair for members in families(EXPERTS) for pair in rename_family(members, rename, known))
    assert found[exception] == ("kept", None)


def test_families_are_sorted_by_their_numbers() -> None:
    (members,) = families(["a.10.b2", "a.9.b11", "a.9.b2"])
    assert [name for _, name in members] == ["a.9.b2", "a.9.b11", "a.10.b2"]


def test_numbers_inside_a_part_are_text() -> None:
    assert len(families(["a.conv2d.x", "a.conv3d.x", "a.1.x", "a.2.x"])) == 3
