"""What is kept by default in every model class of transformers: a table that shows when a decision changes.

`python tests/model/test_every_class.py` writes the table anew; look at what it changes in the modeling code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import transformers
from model_classes import built, linears, without_numbers
from quantload.model.linears import Products
from quantload.model.roles import roles
from transformers import PreTrainedModel

TABLE = Path(__file__).parents[1] / "data" / "kept_by_default.json"
Kept = dict[str, str]


def kept(model: PreTrainedModel) -> Kept:
    """Why each linear layer is kept whatever its weights are, by names with `*` for the numbers in them."""
    products, found = Products(), roles(model)
    reasons = {name: found.get(name) or products.objection(module) for name, module in linears(model).items()}
    return {without_numbers(name): reason for name, reason in reasons.items() if reason is not None}


def written(models: Mapping[str, Kept]) -> str:
    """The table as text, a line a class."""
    lines = [f"  {json.dumps(name)}: {json.dumps(reasons)}" for name, reasons in sorted(models.items())]
    about = {"transformers": transformers.__version__}
    return "\n".join(["{", f'  "about": {json.dumps(about)},', ",\n".join(lines), "}", ""])


def all_kept() -> dict[str, Kept]:
    """Of every class that can be built here."""
    return {name: kept(model) for name, model in built() if isinstance(model, PreTrainedModel)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_every_class_keeps_by_default_is_what_was_looked_at() -> None:
    table = json.loads(TABLE.read_text())
    if table.pop("about")["transformers"] != transformers.__version__:
        pytest.skip("the table is of another version of transformers, whose classes may have other layers")
    found = all_kept()
    assert len(found) > 1600
    assert found == table


if __name__ == "__main__":
    TABLE.write_text(written(all_kept()))
