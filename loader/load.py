"""Load a checkpoint straight into a quantized model. Read this file first: it is the whole flow."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch

from .cache.session import NoCache, open_cache
from .checkpoint.folder import Checkpoint
from .checkpoint.index import CheckpointIndex
from .checkpoint.reader import PieceReader, ReadTotals
from .checkpoint.resolve import resolved
from .digest import model_digest
from .draft import FROM_CONFIG, Draft, draft_load
from .dummy import DummyWeights, Weights, index_without_files
from .errors import PolicyError
from .fit.check import check_fits
from .fit.policy import Fitted, apply_fit
from .fit.warning import warn_of_schemes
from .interrupts import interrupt_kept
from .memory.budget import check_budget, memory_running_out
from .memory.planner import MemoryPlan
from .model import transformers_api
from .model.building import Building
from .model.kept_linears import use_kernel_for_kept
from .online.storage import FinalStorage
from .options import LoadOptions, QuantizationPolicy, check_kinds, with_fit
from .plan import loaded_parameters
from .progress import Progress, showing
from .quantized_model import QuantizedModel
from .ranks.alone import ALONE, Alone, RankSizes
from .recording import Recorder, tensor_bytes
from .reload.remember import remember
from .schemes.names import SchemeName
from .schemes.registry import choose_device
from .threads import warn_of_threads

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger("quantload")


def load_quantized(
    model_id: str | Path | Checkpoint,
    quantization: SchemeName | str = "auto",
    *,
    fit: int | str | None = None,
    device: str | torch.device = "auto",
    policy: QuantizationPolicy | None = None,
    options: LoadOptions | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
    weights: Weights = "checkpoint",
    tp: Literal["auto"] | None = None,
    device_mesh: DeviceMesh | None = None,
    expert_parallel: bool = False,
) -> QuantizedModel:
    """Stream a BF16, FP16, FP32 or quantized checkpoint into a quantized transformers model, ready to generate.

    `model_id` is a folder, a hub id or a URL (or what `checkpoint.resolve` made of one), `quantization` a scheme name
    (`auto`: the checkpoint's own quantization where it has one, else `quark_mxfp4`; any other name quantizes such a
    checkpoint anew), `device` a torch device (`auto`: the first that has kernels). `policy` says in detail which module
    gets which scheme; a scheme name other than `auto` then replaces its `linear`. `options` say how the load runs.
    `progress(bytes_read, bytes_total)` is called in this thread, and what it raises cancels the load; without one a
    bar is shown in a terminal or a notebook, with True everywhere, with False nowhere. The model has `.load_report` and
    `.load_plan`. Raises a `QuantloadError`; afterwards threads, files and memory are as before.

    With `fit`, a number of bytes, text such as "16GiB" or "auto" (what is free), the schemes are chosen that lose least
    with a peak below that; `.load_report.fit` says which. It is `LoadOptions.fit`, and goes with `quantization="auto"`.

    With `weights="dummy"` no weight is read: the model has random numbers for weights, the same ones each time, and
    takes the memory and the kernels of the real one. A folder with a `config.json` and no weights is enough for that.

    With `tp="auto"` the model is divided among the ranks of the process group, or of a one-dimensional `device_mesh`,
    by transformers' plan for it: every rank calls this and reads what is its own. With `expert_parallel` each has
    whole experts. A failure of one is a `RankError` on the others.
    """
    check_kinds(policy, options)
    options = with_fit(options, fit)
    together = ALONE
    if tp is not None or device_mesh is not None or expert_parallel:
        from .ranks.together import local_device, ranks_of

        device = local_device(choose_device(device))
        together = ranks_of(tp, device_mesh, device, expert_parallel)
    return load_into(
        FROM_CONFIG,
        model_id,
        quantization,
        device=device,
        policy=policy,
        options=options,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=progress,
        weights=weights,
        ranks=together,
    )


def load_into(
    building: Building,
    model_id: str | Path | Checkpoint,
    quantization: SchemeName | str,
    *,
    device: str | torch.device,
    policy: QuantizationPolicy | None,
    options: LoadOptions | None,
    revision: str | None,
    trust_remote_code: bool,
    progress: Progress | bool | None,
    weights: Weights = "checkpoint",
    ranks: Alone = ALONE,
) -> QuantizedModel:
    """`load_quantized` with the model that `building` makes: an engine may have one already."""
    check_kinds(policy, options)
    if weights not in get_args(Weights):
        raise PolicyError(f"weights is {weights!r}; choose one of {', '.join(get_args(Weights))}")
    options = options or LoadOptions()
    place = choose_device(device)
    if place.type == "cpu":
        warn_of_threads()
    planned: list[MemoryPlan] = []
    with (
        torch.inference_mode(False),
        transformers_api.on_cpu(),
        interrupt_kept(),
        ranks.quiet(),
        ranks.loading(),
        memory_running_out(planned),
        showing(progress, "loading") as told,
        Recorder(place, options.stats, told) as recorder,
        resolved(model_id, revision) as checkpoint,
    ):
        recorder.begin("plan")
        recorder.name(checkpoint.model_id, str(quantization))
        is_dummy = weights == "dummy"
        index = index_without_files(checkpoint, trust_remote_code) if is_dummy else None
        policy, options, fitted = _with_schemes_that_fit(
            *(building, checkpoint, quantization, policy, options, place, trust_remote_code, ranks, index)
        )
        cache = (
            DummyWeights(checkpoint, options, recorder.on_layer)
            if is_dummy
            else open_cache(checkpoint, options, recorder.on_layer, trust_remote_code, ranks)
        )

        def load() -> tuple[Draft, ReadTotals]:
            with FinalStorage(place) as storage:
                draft = draft_load(
                    checkpoint,
                    quantization,
                    policy,
                    options,
                    storage,
                    cache.on_layer,
                    trust_remote_code,
                    building=building,
                    ranks=ranks,
                    index=index,
                    begin=recorder.begin,
                )
                planned.append(draft.plan.memory)
                warn_of_schemes(draft)
                return draft, _stream(draft, building, cache, recorder, options, storage, ranks)

        draft, totals = cache.attempt(load)
        sizes = RankSizes(totals.bytes_read, tensor_bytes(draft.model), recorder.ledger.peak_bytes)
        all_sizes = ranks.loaded(draft.rank_plan, draft.model, sizes)
    model = cast(QuantizedModel, draft.model)
    with ranks.quiet():
        model.load_report = recorder.report(
            f"{checkpoint.model_id} (dummy weights)" if is_dummy else checkpoint.model_id,
            draft.rules.name,
            totals,
            sizes.final_bytes,
            tensor_bytes,
            cache.result,
            draft.non_finite(),
            ranks.numbers,
        )
    checkpoint.files.tell(model.load_report.note_source)
    model.load_report.fit = None if fitted is None else fitted.report()
    if all_sizes:
        model.load_report.note_ranks(all_sizes, draft.replicated_bytes)
    model.load_report.commit = checkpoint.commit
    model.load_plan = draft.plan.memory
    remember(model, draft, options, trust_remote_code, ranks)
    if options.digest:
        with memory_running_out(planned):
            found, seconds = model_digest(model, options.worker_count())
        model.load_report.digest, model.load_report.digest_seconds = found, seconds
        logger.info("Digest of the final tensors: %s, in %.1f s", found, seconds)
    return model


def _with_schemes_that_fit(
    building: Building,
    checkpoint: Checkpoint,
    quantization: str,
    policy: QuantizationPolicy | None,
    options: LoadOptions,
    device: torch.device,
    trust_remote_code: bool,
    ranks: Alone,
    index: CheckpointIndex | None,
) -> tuple[QuantizationPolicy | None, LoadOptions, Fitted | None]:
    """The policy to load with, where `options` ask for one that stays below a size, and options without that."""
    if options.fit is not None and ranks.ranks > 1:
        raise PolicyError("fit is for one process: plan with it alone, --save-policy, and give ranks --policy")
    if options.fit is not None and building is not FROM_CONFIG:
        raise PolicyError("fit is for load_quantized: plan with it, --save-policy, and give QuantloadConfig the policy")
    return apply_fit(
        *(checkpoint, quantization, policy, options), device=device, trust_remote_code=trust_remote_code, index=index
    )


def _stream(
    draft: Draft,
    building: Building,
    cache: NoCache,
    recorder: Recorder,
    options: LoadOptions,
    storage: FinalStorage,
    ranks: Alone,
) -> ReadTotals:
    """Fill the model of a draft."""
    device = storage.device
    memory = draft.plan.memory
    recorder.begin("check")
    recorder.allow(memory.peak_bytes, options.max_memory)
    of_host = ranks.of_host(memory)
    check_budget(of_host if options.memory_scope == "host" else memory, options.max_memory)
    of_cpu = replace(draft, plan=replace(draft.plan, memory=of_host))
    verdict = check_fits(draft if device.type != "cpu" else of_cpu, options)
    available = None if verdict.limit is None else verdict.limit.available
    recorder.allow(memory.peak_bytes, options.max_memory, available)
    storage.expect(draft.plan.final_sizes)
    ranks.expect(draft.plan.observed)
    with cache.reading(draft) as reading:
        recorder.expect(reading.plan, draft.assignments)
        reader = PieceReader(
            reading.source,
            reading.shards,
            workers=draft.plan.workers,
            chunk_bytes=draft.plan.chunk_bytes,
            staging_bytes=draft.plan.memory.staging_bytes,
            device=device,
            cancel=ranks.cancel,
            on_progress=recorder.on_bytes,
        )
        totals = reader.run(reading.plan.pieces)
        recorder.begin("finish")
        draft.loaders.check_complete(loaded_parameters(draft.mapped, draft.loaders))
    untied = building.finish(draft.model, draft.mapped, device)
    recorder.on_untied(untied, options.strict)
    draft.untied.say_so(draft.model)
    if device.type == "cpu":
        use_kernel_for_kept(draft.model, options.kernels)
    return totals
