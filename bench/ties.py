"""Every model class with tied parameters: from which one of a group transformers and quantload fill the others.

python bench/ties.py                # all classes, a few minutes; the result goes to bench/results
python bench/ties.py --only Bart    # those whose names the pattern finds

Each class is built without memory for its weights. For each of the names in its groups of tied parameters, a checkpoint
is assumed that has this one and none of the others: who shares a parameter with whom in the end must be the same, and
quantload may miss none.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe_machine
from quantload.model import transformers_api
from result_files import RESULTS, write_result
from shrunk_models import ModelClass, model_classes, shrunk_configs
from torch import nn
from transformers import PreTrainedModel

SAME, MISSED, OTHER, REFUSED = "the same", "missed", "others are shared", "fails in transformers"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="classes whose names it finds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    chosen = parser.parse_args(arguments)
    rows, not_built = [], {}
    for model in model_classes(chosen.only):
        built = _built(model)
        if isinstance(built, str):
            not_built[model.class_name] = built
        elif built.all_tied_weights_keys:
            rows += [{"class": model.class_name, **row} for row in compared(built)]
    counts = Counter(row["result"] for row in rows)
    result = {
        "machine": describe_machine(),
        "classes": len({row["class"] for row in rows}),
        "largest_group": max((row["group"] for row in rows), default=0),
        "counts": dict(counts),
        "not_built": not_built,
        "rows": [row for row in rows if row["result"] != SAME],
    }
    path = write_result("ties", result, chosen.out, "part" if chosen.only else "")
    print(f"{path}: {result['classes']} classes, {dict(counts)}, {len(not_built)} not built")
    return int(bool(counts[MISSED] or counts[OTHER]))


def _built(model: ModelClass) -> PreTrainedModel | str:
    """The first model that builds, with everything tied that the class can tie; else why none does."""
    why = "no config"
    for config in shrunk_configs(model):
        config.tie_word_embeddings = True
        try:
            return transformers_api.meta_model(model.cls, config, Path(), torch.float32)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:400]
    return why


def compared(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """For the first names of all groups, then the second, and so on: what became of it."""
    groups: dict[str, list[str]] = defaultdict(list)
    for target, source in model.all_tied_weights_keys.items():
        groups[source].append(target)
    members = [[source, *targets] for source, targets in groups.items()]
    before = {name: _at(model, name) for group in members for name in group}
    ties, size = dict(model.all_tied_weights_keys), max(map(len, members))
    for number in range(size):
        there = {group[min(number, len(group) - 1)] for group in members}
        row: dict[str, Any] = {"there": sorted(there), "group": size}
        outcomes: list[Any] = []
        for settle in (False, True):
            for name, parameter in before.items():
                _put(model, name, parameter)
            model.all_tied_weights_keys = dict(ties)
            missing = {*before} - there
            if settle:
                transformers_api.tie_to(model, there)
                wanted, _ = transformers_api.complaints(model, missing, ())
                row["missed"] = sorted(wanted)
            try:
                model.tie_weights(missing_keys=missing, recompute_mapping=False)
            except Exception as error:
                outcomes.append(f"{type(error).__name__}: {error}"[:400])
                continue
            outcomes.append({name: id(_at(model, name)) for name in before})
        yield {**row, "result": _result(row, *outcomes)}


def _result(row: dict[str, Any], theirs: Any, ours: Any) -> str:
    if isinstance(theirs, str):
        row["detail"] = theirs
        return REFUSED
    if row["missed"] or isinstance(ours, str):
        return MISSED
    return SAME if theirs == ours else OTHER


def _at(model: nn.Module, name: str) -> torch.Tensor:
    path, _, attribute = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), attribute)
    return found


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, tensor)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    sys.exit(main())
