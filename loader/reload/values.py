"""A load that is planned for tensors which its caller hands over: there are no files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..checkpoint.index import CheckpointIndex
from ..draft import Draft, draft_load
from ..model.attach import OnFinished
from ..model.coordinates import Coordinates
from ..model.routes import Routes, build_routes
from ..model.transformers_api import Conversion
from ..plan import LoadPlan, plan_without_pieces
from .living import HeldStorage, LivingModel
from .settings import LoadSettings


class GivenTensors(Checkpoint):
    """Stands where a load has a checkpoint; there is nothing to be read from it."""

    is_quantized = False  # folders with a config have a property

    def note_configs(self) -> None:
        """There are no files."""

    def note_code(self) -> None:
        """There are no files."""

    def config(self) -> dict[str, Any]:
        """Nothing is said of how these tensors are stored: they are values."""
        return {}


def draft_values(model: Any, settings: LoadSettings, storage: HeldStorage, on_layer: OnFinished, label: str) -> Draft:
    """A draft of the tensors that the checkpoint of the first load had, to be quantized as they were then."""
    entries = {entry.name: entry for entry in settings.tensors}
    total = sum(entry.nbytes for entry in entries.values())
    living = LivingModel(model)
    return draft_load(
        GivenTensors(living.root, label),
        "auto",
        settings.policy,
        replace(settings.options, cache=None),
        storage,
        on_layer,
        settings.trust_remote_code,
        plan=_plan,
        building=living,
        ranks=settings.ranks,
        index=CheckpointIndex((), entries, total, {}),
    )


def _plan(*drafted: Any) -> LoadPlan:
    """Sizes alone: what is read at once is up to the caller."""
    return plan_without_pieces(*drafted)


def own_routes(draft: Draft, parameter: str) -> Routes:
    """The routes of a tensor that is called as the parameter it goes to, and shaped as it is without quantization.

    Of a parameter that ranks divide that is the whole of it.
    """
    tensor = draft.mapped.shapes.tensors[parameter]
    conversion = Conversion(parameter, None)
    conversion.add(None, [parameter])
    coordinates: Any = Coordinates.of(0, own_shape(draft, parameter), tensor.dtype)
    share = draft.rank_plan.shares.get(parameter)
    if share is not None:
        coordinates = share.of(coordinates)
    alone = replace(draft.mapped, coordinates={parameter: (coordinates, conversion)}, not_expressible=[])
    return build_routes(alone, draft.loaders.landing)


def own_shape(draft: Draft, parameter: str) -> tuple[int, ...]:
    """The shape of a parameter without quantization, of all ranks together."""
    shape, share = tuple(draft.mapped.shapes.tensors[parameter].shape), draft.rank_plan.shares.get(parameter)
    if share is None:
        return shape
    return (*shape[: share.dim], share.size, *shape[share.dim + 1 :])
