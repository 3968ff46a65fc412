"""Which layers of every model class are kept as routers and heads: the same when sizes are tiny, and alike by accident.

    python bench/roles.py               # all classes, some minutes; the result goes to bench/results
    python bench/roles.py --only Dia    # those whose names the pattern finds

The table in tests/data says what each class keeps with the widths that its config class has of itself, where no two
sizes are the same by accident. In a shrunk model many are: layers may be as wide as the vocabulary, or as there are
experts or labels. The same layers must be kept in both.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe_machine
from quantload.model import roles, transformers_api
from result_files import RESULTS, write_result
from shrunk_models import ModelClass, model_classes, shrunk_configs
from torch import nn
from transformers import PreTrainedModel

TABLE = Path(__file__).resolve().parents[1] / "tests" / "data" / "kept_by_default.json"
SAME, OTHER, UNKNOWN = "the same", "others are kept", "not in the table"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="classes whose names it finds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    chosen = parser.parse_args(arguments)
    table = json.loads(TABLE.read_text())
    about = table.pop("about")
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    rows, not_built = [], []
    for model in model_classes(chosen.only):
        built = _built(model)
        if built is None:
            not_built.append(model.class_name)
            continue
        kept = _kept(built)
        reasons.update(reason for reason, _ in kept.values())
        row = _compared(model.class_name, kept, table.get(model.class_name), built)
        counts[row["result"]] += 1
        coincidences = {width for _, width in kept.values()}
        row["as_wide"] = sum(width in coincidences for width in _widths(built).values()) - len(kept)
        rows.append(row)
    result = {
        "machine": describe_machine(),
        "table": about,
        "counts": dict(counts),
        "reasons": dict(reasons),
        "classes_with_layers_as_wide_as_a_head_or_router": sum(row["as_wide"] > 0 for row in rows),
        "not_built": not_built,
        "rows": [row for row in rows if row["result"] != SAME],
    }
    path = write_result("roles", result, chosen.out, "part" if chosen.only else "")
    print(f"{path}: {dict(counts)}, {dict(reasons)}, {len(not_built)} not built")
    for row in result["rows"]:
        print(row)
    return int(bool(counts[OTHER]))


def _built(model: ModelClass) -> PreTrainedModel | None:
    """The first shrunk model that builds, without memory for its weights."""
    for config in shrunk_configs(model):
        try:
            return transformers_api.meta_model(model.cls, config, Path(model.class_name), torch.float32)
        except Exception:  # what a class does not take is its own affair: the next config
            continue
    return None


def _kept(model: PreTrainedModel) -> dict[str, tuple[str, int]]:
    """Reason and width of every router and head; layers of few outputs are left out, as fewer are in a shrunk model."""
    widths = _widths(model)
    found = roles.roles(model)
    return {name: (reason, widths[name]) for name, reason in found.items() if _is_role(reason)}


def _widths(model: PreTrainedModel) -> dict[str, int]:
    return {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _is_role(reason: str) -> bool:
    return reason in ("output head", "router or gate")


def _compared(
    name: str, kept: dict[str, Any], expected: dict[str, str] | None, model: PreTrainedModel
) -> dict[str, Any]:
    if expected is None:
        return {"class": name, "result": UNKNOWN, "more": sorted(kept), "fewer": []}
    roles_there = {key for key, reason in expected.items() if _is_role(reason)}
    wide = {_pattern(key) for key, width in _widths(model).items() if width > roles.FEW_OUTPUTS}
    found = {_pattern(key) for key in kept}
    more, fewer = sorted(found - roles_there), sorted((roles_there & wide) - found)
    return {"class": name, "result": OTHER if more or fewer else SAME, "more": more, "fewer": fewer}


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    sys.exit(main())
