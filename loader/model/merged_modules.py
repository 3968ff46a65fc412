"""Linear layers that engines run as one: what has one scale for a tensor must have one for all of them.

The names are those that llm-compressor gives one global scale and vLLM's `packed_modules_mapping` merges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
)


def merged_modules(names: Iterable[str]) -> list[list[str]]:
    """Groups of modules, by their names, that are children of one module and run as one where all of them are there."""
    children: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parent, _, child = name.rpartition(".")
        children[parent].add(child)
    return [
        [f"{parent}.{child}" if parent else child for child in group]
        for parent, own in children.items()
        for group in MERGED
        if own.issuperset(group)
    ]
