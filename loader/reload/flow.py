"""Give a loaded model new weights, quantized into the memory that the old ones have."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache.session import NoCache
from ..checkpoint.folder import Checkpoint
from ..checkpoint.pieces import Piece
from ..checkpoint.reader import PieceReader, ReadTotals
from ..checkpoint.resolve import resolved
from ..digest import model_digest
from ..draft import Draft, draft_load
from ..interrupts import interrupt_kept
from ..memory.budget import check_budget, memory_running_out
from ..memory.planner import MemoryPlan
from ..memory.report import LoadReport
from ..model import transformers_api
from ..model.leftovers import some
from ..options import LoadOptions
from ..pieces.plain import plan_pieces
from ..plan import LoadPlan, loaded_parameters, plan_load
from ..progress import Progress, showing
from ..quantized_model import QuantizedModel
from ..ranks.alone import Alone, RankSizes
from ..recording import Recorder, tensor_bytes
from .adapters import LoraAdapter, check_undivided, merge_adapter
from .alone import alone, settings_of
from .folder import TensorsOf
from .living import HeldStorage, LivingModel, allow_forward, bind, refuse_forward
from .remember import remember
from .settings import LoadSettings
from .shared import SameValues, are_one, fill_tied, ties
from .update import Given, WeightUpdate

logger = logging.getLogger("quantload")
_ABOUT_FILES = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"})
"""Fields of a config that say nothing of what a model computes."""


def reload_weights(
    model: QuantizedModel,
    source: str | Path | Checkpoint | Iterable[Given] | Mapping[str, Tensor],
    *,
    partial: bool = False,
    adapter: LoraAdapter | str | Path | None = None,
    revision: str | None = None,
    progress: Progress | bool | None = None,
) -> LoadReport:
    """Quantize new weights into the memory of a model that `load_quantized` returned; no data pointer changes.

    `source` is a checkpoint as `load_quantized` takes it, of the same model, or its tensors in any order: pairs of name
    and tensor, with the index of its first element as a third for a part of one. Schemes, policy and options are those
    of the first load, and the result is what that load would make of these weights. The report, which is
    `model.load_report` afterwards, is that of such a load. With `partial`, tensors that do not come stay as they are;
    without, `MissingWeightsError` names them. `adapter`, for LoRA, or the folder of one, is added to the weights on
    their way. Memory: what is held at most above the model is the staging arena and 64 MiB. Nobody may use the model
    meanwhile. Raises a `QuantloadError`: `PolicyError` where the new weights would not be what the model has memory
    for, before anything is written. Where something was, `model.load_report.state` is `incomplete` and the forward of
    the model raises `IncompleteModelError` until another reload has brought what is missing.

    A model that is divided among ranks is reloaded by all of them at once: each calls this with the same arguments, and
    reads, or takes of the tensors, what is its own. What fails on one is a `RankError` on the others.
    """
    ranks = settings_of(model).ranks
    check_undivided(adapter, ranks)
    if adapter is not None and not isinstance(adapter, LoraAdapter):
        adapter = LoraAdapter.read(adapter)
    if not isinstance(source, (str, Path, Checkpoint)):
        with WeightUpdate(model, partial=partial, adapter=adapter) as update:
            update.load(source)
            return update.finish()
    if partial:
        with ExitStack() as held:
            with ranks.loading():  # a rank that cannot read it must not leave others in the update
                checkpoint = held.enter_context(resolved(source, revision))
                tensors = TensorsOf(checkpoint, settings_of(model).options)
            update = WeightUpdate(model, partial=True, adapter=adapter, label=checkpoint.model_id)
            with update:
                tensors.wants = update.wants
                update.load(tensors)
                return update.finish()
    with (
        alone(model) as settings,
        settings.ranks.quiet(),
        settings.ranks.loading(),
        resolved(source, revision) as checkpoint,
    ):
        return _from_checkpoint(model, checkpoint, settings, adapter, progress)


@contextmanager
def surroundings(
    model: Any, options_stats: bool, progress: Progress | bool | None, planned: list[MemoryPlan]
) -> Iterator[Recorder]:
    """What a load runs in, and who writes down what it does."""
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(transformers_api.on_cpu())
        stack.enter_context(interrupt_kept())
        stack.enter_context(memory_running_out(planned))
        told = stack.enter_context(showing(progress, "reloading"))
        yield stack.enter_context(Recorder(device, options_stats, told, "reload"))


def _from_checkpoint(
    model: Any,
    checkpoint: Checkpoint,
    settings: LoadSettings,
    adapter: LoraAdapter | None,
    progress: Progress | bool | None,
) -> LoadReport:
    planned: list[MemoryPlan] = []
    options, ranks = replace(settings.options, cache=None), settings.ranks
    with surroundings(model, options.stats, progress, planned) as recorder:
        recorder.begin("plan")
        storage = HeldStorage(next(model.parameters()).device)
        planner = _Planner(model, adapter)
        draft = draft_load(
            checkpoint,
            "auto",
            settings.policy,
            options,
            storage,
            recorder.on_layer,
            settings.trust_remote_code,
            plan=planner,
            building=LivingModel(model),
            ranks=ranks,
            begin=recorder.begin,
        )
        recorder.begin("check")
        memory = draft.plan.memory
        planned.append(memory)
        of_host = ranks.of_host(memory)
        check_budget(of_host if options.memory_scope == "host" else memory, options.max_memory)
        bind(draft.model, model, draft.loaders)
        _warn_of_config(model, checkpoint)
        ranks.expect(draft.plan.observed)
        ranks.any("planned", True)  # nobody begins to write before all of them can
        refuse_forward(model, f"the reload of {checkpoint.model_id} did not come to its end", None)
        totals = _read(draft, checkpoint, planner.compared, recorder, options, ranks)
        recorder.begin("finish")
        fill_tied(draft.model, model, draft.mapped.missing)
        report = recorder.report(
            checkpoint.model_id,
            draft.rules.name,
            totals,
            tensor_bytes(model),
            tensor_bytes,
            None,
            draft.non_finite(),
            ranks.numbers,
        )
        sizes = RankSizes(totals.bytes_read, report.final_bytes, report.peak_bytes)
        all_sizes = ranks.reloaded(draft.rank_plan, model, sizes)
        if all_sizes:
            report.note_ranks(all_sizes, draft.replicated_bytes)
        if options.digest:
            report.digest, report.digest_seconds = model_digest(model, options.worker_count())
    allow_forward(model)
    model.load_report, model.load_plan = report, draft.plan.memory
    remember(model, draft, settings.options, settings.trust_remote_code, ranks)
    return report


def _warn_of_config(model: Any, checkpoint: Checkpoint) -> None:
    """Say what the config of the checkpoint says otherwise than that of the model, which the model keeps."""
    held = model.config.to_dict()
    about = _ABOUT_FILES | ({"tie_word_embeddings"} if hasattr(model, "untied_parameters") else set())
    said = {name: value for name, value in checkpoint.config().items() if name not in about and name in held}
    other = [
        f"{name} {value!r}, in the model {held[name]!r}"
        for name, value in said.items()
        if isinstance(value, (int, float, str, type(None))) and value != held[name]
    ]
    if other:
        logger.warning(
            "config.json of %s is not that of the model, which keeps its own: %s", checkpoint.model_id, some(other)
        )


class _Planner:
    """Plans a reload: tensors that come for parameters which have their values from another are compared, at the end.

    `compared` are the pieces of those.
    """

    def __init__(self, model: Any, adapter: LoraAdapter | None) -> None:
        self._tensors, self._adapter = model.state_dict(keep_vars=True), adapter
        self.compared: list[Piece] = []

    def __call__(self, skeleton: Any, *drafted: Any) -> LoadPlan:
        index, mapped, _, routes, loaders, *_ = drafted
        if self._adapter is not None:
            merge_adapter(self._adapter, loaders, routes, dict(ties(skeleton)))
        twice = {
            name: other
            for name, other in ties(skeleton)
            if not {name, other} & mapped.missing and are_one(self._tensors, name, other)
        }
        apart = {}
        for tensor in list(routes.spans) if twice else ():
            if any(span.parameter in twice for span in routes.spans[tensor]):
                apart[tensor] = routes.spans.pop(tensor)
        planned = plan_load(skeleton, *drafted)
        sinks = {name: SameValues(loaders.sinks[name], other) for name, other in twice.items()}
        entries = [index.tensors[name] for name in apart]
        self.compared = plan_pieces(entries, apart, sinks, planned.chunk_bytes).pieces
        return replace(planned, bytes_total=planned.bytes_total + sum(piece.nbytes for piece in self.compared))


def _read(
    draft: Draft,
    checkpoint: Checkpoint,
    compared: list[Piece],
    recorder: Recorder,
    options: LoadOptions,
    ranks: Alone,
) -> ReadTotals:
    """Fill the model behind a draft."""
    with NoCache(checkpoint, options, recorder.on_layer, ranks).reading(draft) as reading:
        recorder.expect(draft.plan, draft.assignments)
        reader = PieceReader(
            reading.source,
            reading.shards,
            workers=draft.plan.workers,
            chunk_bytes=draft.plan.chunk_bytes,
            staging_bytes=draft.plan.memory.staging_bytes,
            device=draft.schemes.device,
            cancel=ranks.cancel,
            on_progress=recorder.on_bytes,
        )
        with reader:
            totals = reader.run(draft.plan.pieces)
            if compared:
                again = reader.run(compared)
                totals = replace(
                    totals, bytes_read=totals.bytes_read + again.bytes_read, seconds=totals.seconds + again.seconds
                )
        draft.loaders.check_complete(loaded_parameters(draft.mapped, draft.loaders))
    return totals
