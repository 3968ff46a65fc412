"""Load a checkpoint straight into a quantized model. Read this file first: it is the whole flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .cache.session import NoCache, open_cache
from .checkpoint.index import CheckpointIndex, read_index
from .checkpoint.reader import PieceReader, ReadTotals
from .checkpoint.resolve import Checkpoint, resolve
from .checkpoint.small_tensors import SmallTensors
from .collector import collector_paused
from .cpu_kernels import import_cpu_kernels
from .memory.budget import check_budget
from .model import transformers_api
from .model.routes import CheckpointMap, Routes, build_routes, map_checkpoint
from .model.skeleton import Assignment, assign_schemes, find_model
from .model.stored_sources import StoredSources, turn_conv1d
from .online.attach import OnFinished, WeightLoaders, attach_weight_loaders
from .online.storage import FinalStorage
from .options import LoadOptions, QuantizationPolicy
from .plan import LoadPlan, loaded_parameters, plan_load
from .recording import Progress, Recorder, tensor_bytes
from .schemes.policy import Policy, choose_policy
from .schemes.registry import SchemeFactory, choose_device
from .schemes.stored.read import read_stored

import_cpu_kernels()


def load_quantized(
    model_id: str | Path,
    quantization: str = "auto",
    *,
    device: str | torch.device = "auto",
    policy: QuantizationPolicy | None = None,
    options: LoadOptions | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Stream a BF16, FP16, FP32 or quantized checkpoint into a quantized transformers model, ready to generate.

    `model_id` is a folder or a hub id, `quantization` a scheme name (`auto`: the checkpoint's own quantization where
    it has one, else `quark_mxfp4`; any other name quantizes such a checkpoint anew), `device` a torch device
    (`auto`: the first that has kernels). `policy` says in detail which module gets which scheme; a scheme name other
    than `auto` then replaces its `linear`. `options` say how the load runs. `progress(bytes_read, bytes_total)` is
    called in this thread; what it raises cancels the load. The model has `.load_report` and `.load_plan`. Raises a
    `QuantloadError`; afterwards threads, files and memory are as before.
    """
    options = options or LoadOptions()
    place = choose_device(device)
    with torch.inference_mode(False), Recorder(place, options.stats, progress) as recorder:
        checkpoint = resolve(model_id, revision)
        cache = open_cache(checkpoint, options, recorder.on_layer, trust_remote_code)

        def load() -> tuple[Draft, ReadTotals]:
            with FinalStorage(place) as storage:
                draft = draft_load(
                    checkpoint, quantization, policy, options, storage, cache.on_layer, trust_remote_code
                )
                return draft, _stream(draft, cache, recorder, options, storage.device)

        draft, totals = cache.attempt(load)
    model = draft.model
    model.load_report = recorder.report(
        checkpoint.model_id, draft.rules.name, totals, tensor_bytes(model), tensor_bytes, cache.result
    )
    model.load_plan = draft.plan.memory
    return model


def _stream(draft: Draft, cache: NoCache, recorder: Recorder, options: LoadOptions, device: torch.device) -> ReadTotals:
    """Fill the model of a draft."""
    check_budget(draft.plan.memory, options.max_memory)
    with cache.reading(draft) as reading:
        recorder.expect(reading.plan, draft.assignments)
        reader = PieceReader(
            reading.source,
            reading.shards,
            workers=draft.plan.workers,
            chunk_bytes=draft.plan.chunk_bytes,
            staging_bytes=draft.plan.memory.staging_bytes,
            device=device,
            on_progress=recorder.on_bytes,
        )
        totals = reader.run(reading.plan.pieces)
        draft.loaders.check_complete(loaded_parameters(draft.mapped, draft.loaders))
    transformers_api.finish(draft.model, draft.mapped.missing, draft.mapped.weight_conversions, device)
    return totals


@dataclass(frozen=True)
class Draft:
    """A load that is planned and has not read a weight: the model on meta, and where everything will go."""

    index: CheckpointIndex
    model: Any
    schemes: SchemeFactory
    rules: Policy
    mapped: CheckpointMap
    sources: StoredSources
    assignments: list[Assignment]
    loaders: WeightLoaders
    routes: Routes
    plan: LoadPlan


def draft_load(
    checkpoint: Checkpoint,
    quantization: str,
    policy: QuantizationPolicy | None,
    options: LoadOptions,
    storage: FinalStorage,
    on_layer: OnFinished,
    trust_remote_code: bool,
    plan: Callable[..., LoadPlan] = plan_load,
) -> Draft:
    """Everything before the first weight: schemes and kernels, index, skeleton, routes, and what `plan` makes of it."""
    chosen = choose_policy(quantization, policy, checkpoint.is_quantized)
    schemes = SchemeFactory(storage.device, options, chosen.scale_mode)
    rules = Policy(chosen, schemes, checkpoint.is_quantized)
    recipe = find_model(checkpoint, trust_remote_code)
    source_dtype = torch.float32 if checkpoint.is_quantized else recipe.dtype  # codes become float32 on their way
    with schemes.compiling(source_dtype), collector_paused():
        index = read_index(checkpoint)
        with SmallTensors(checkpoint, index) as read:
            stored = read_stored(checkpoint.config(), index.tensors, read)
        model, dtype = recipe.build(stored.plain.values())
        stored = turn_conv1d(model, stored)
        mapped = map_checkpoint(model, stored.entries)
        sources = StoredSources(stored, mapped)
        dtype_of = transformers_api.DtypePlan(model, dtype)
        assignments = assign_schemes(model, rules, dtype, options.strict, sources)
        loaders = attach_weight_loaders(model, assignments, dtype_of, storage, on_layer)
        routes = build_routes(mapped, loaders.landing)
        planned = plan(model, index, mapped, sources, routes, loaders, assignments, options, schemes)
    return Draft(index, model, schemes, rules, mapped, sources, assignments, loaders, routes, planned)


def plan_quantized(
    model_id: str | Path,
    quantization: str = "auto",
    *,
    device: str | torch.device = "auto",
    policy: QuantizationPolicy | None = None,
    options: LoadOptions | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Draft:
    """What `load_quantized` would do with the same arguments: modules, schemes and memory, no weight read.

    `.plan.memory` is the prediction. Raises what `load_quantized` would raise up to there, the budget included.
    """
    options = options or LoadOptions()
    storage = FinalStorage(choose_device(device))
    checkpoint = resolve(model_id, revision)
    draft = draft_load(checkpoint, quantization, policy, options, storage, lambda *_: None, trust_remote_code)
    check_budget(draft.plan.memory, options.max_memory)
    return draft
