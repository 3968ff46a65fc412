"""The config of an entry: that of the model, and what its codes and scales mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..model.meaning import meaning
from ..model.skeleton import Assignment
from ..model.untying import Untied
from ..schemes.stored.quantload import METHOD


def entry_config(checkpoint: Checkpoint, assignments: Iterable[Assignment], untied: Untied) -> dict[str, Any]:
    """`config.json` of the checkpoint with a `quantization_config` that `schemes.stored.quantload` reads."""
    config = untied.config(checkpoint.config())
    config.pop("transformers_weights", None)  # the shards have the usual names
    modules = ((each.name, each.module) for each in assignments if each.scheme is not None)
    return config | {"quantization_config": {"quant_method": METHOD, **meaning(modules)}}
