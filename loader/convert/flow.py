"""Convert a checkpoint to a quantized checkpoint without building the model: the whole flow, from top to bottom."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.folder import CONFIG_NAME, SMALL_FILES, Checkpoint
from ..checkpoint.index import CheckpointIndex
from ..checkpoint.output import UNFINISHED, OutputFolder
from ..checkpoint.paths import locate
from ..checkpoint.quantization_config import FILES as QUANTIZATION_FILES
from ..checkpoint.reader import PieceReader
from ..checkpoint.remote.upload import LIBRARY_BYTES, is_url, shown, upload_to
from ..checkpoint.resolve import resolved
from ..checkpoint.source import Source, read_bytes
from ..checkpoint.weight_map import INDEX_NAME
from ..checkpoint.working_memory import CPU, slots_per_worker
from ..checkpoint.writer import ShardPlan, weight_index
from ..collector import collector_paused
from ..draft import Draft
from ..errors import PolicyError
from ..interrupts import interrupt_kept
from ..local_paths import local_path
from ..memory.amounts import parse_bytes
from ..memory.budget import check_budget, memory_running_out
from ..memory.limits import memory_limits
from ..memory.overhead import WRITTEN_PIECES, WRITTEN_TENSORS
from ..memory.planner import MemoryPlan
from ..memory.report import LoadReport
from ..memory.verdict import judge
from ..model import transformers_api
from ..model.leftovers import some
from ..model.modeling_code import layers_cast_to
from ..options import LoadOptions, QuantizationPolicy, check_kinds, with_fit, without_fit
from ..pieces.plain import plan_pieces
from ..pieces.stored import plan_stored
from ..plan import MIN_CHUNK, LoadPlan, plan_staging
from ..progress import Progress, showing
from ..recording import Recorder
from ..schemes.exported.own import OWN
from ..schemes.exported.registry import get_export_format
from ..schemes.exported.weights import ExportFormat
from ..schemes.names import ExportName, SchemeName
from .model_card import (
    CARD,
    Conversion,
    base_model,
    command_line,
    described,
    documents,
)
from .model_card import model_card as make_card
from .names import name_modules
from .planned import FilePlanner
from .shards import OpenShards, PlannedTensor
from .tensors import QuantizedTensor, to_buffers

MAX_SHARD_BYTES = 4 * 10**9
logger = logging.getLogger("quantload")
_KEY_VERSION = 4


def convert_checkpoint(
    model_id: str | Path | Checkpoint,
    out: str | Path,
    quantization: SchemeName | str = "auto",
    *,
    fit: int | str | None = None,
    format: ExportName | str = "quark",
    policy: QuantizationPolicy | None = None,
    options: LoadOptions | None = None,
    max_shard_bytes: int | str = MAX_SHARD_BYTES,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
    model_card: bool = True,
) -> LoadReport:
    """Stream a checkpoint, quantized or not, to a quantized checkpoint in the folder `out`, which must not exist.

    `out` may be the URL of a folder in an object store (s3, gs, az): each shard is uploaded when it is finished, and
    `config.json` last.

    `format` is the checkpoint format: `quark`, `compressed-tensors`, `modelopt`, which holds NVFP4, `mxfp4`, which
    holds the experts of gpt-oss and nothing else quantized, or `quantload`, which no other tool reads, and which holds
    what no other does: NL4, for one. `max_shard_bytes` is the most bytes of tensors in a file,
    or text such as "4GB".
    With `fit` the schemes are chosen that lose least in files of weights of at most so many bytes, or text such as
    "16GiB", among those that the format holds.
    Everything else is as in `load_quantized`, and so are the codes and scales. Memory is bounded by the arena, not by
    the model. While it runs the files lie in `out` + `.unfinished`; a run that was interrupted is taken up there, shard
    by shard. With `model_card` license files are copied, and the model card with what was done; where there is none,
    one is written. The report is that of a load, its `final_bytes` the bytes written. Raises a `QuantloadError`:
    `PolicyError` for a scheme or module the format cannot hold and where nothing would be quantized, `OutputError`
    where nothing can be written.
    """
    check_kinds(policy, options)
    options = with_fit(options, fit)
    if options.fit_head:
        raise PolicyError("fit_head is for loads: no other tool reads a checkpoint with a quantized embedding")
    export = get_export_format(format)
    max_shard_bytes = parse_bytes(max_shard_bytes, "max_shard_bytes (--max-shard-size)")
    if options.digest:
        raise PolicyError("digest is for a loaded model; a conversion has none, its files are their own proof")
    if max_shard_bytes < 1:
        raise PolicyError(f"max_shard_bytes is {max_shard_bytes}; give a positive number of bytes")
    open_output = _output(out)
    planned: list[MemoryPlan] = []
    with (
        torch.inference_mode(False),
        transformers_api.on_cpu(),
        interrupt_kept(),
        memory_running_out(planned),
        showing(progress, "converting") as told,
        Recorder(CPU, options.stats, told, "convert") as recorder,
        resolved(model_id, revision) as checkpoint,
    ):
        small = _small_files(checkpoint)
        papers = documents(checkpoint, small) if model_card else []
        size, measured, given, options = options.fit, options.fit_sensitivity, policy, without_fit(options)
        planner = FilePlanner(checkpoint, export, options, max_shard_bytes, trust_remote_code)
        fitted = None if size is None else planner.fit(quantization, policy, size, measured)
        policy = policy if fitted is None else fitted.policy
        files = planner.plan(quantization, policy)
        draft, tensors, shards = files.draft, files.tensors, files.shards
        with collector_paused():
            config = _config(checkpoint, draft, tensors, export)
            _warn_of_experts(tensors, export)
            _warn_of_casts(draft, tensors, export)
            stored = checkpoint.config().get("quantization_config")
            key = _key(checkpoint, draft.index, shards, [config, stored, policy and asdict(policy), options.stats])
        source = checkpoint.files.source(options)
        with open_output(key) as folder, closing(source):
            found, masks = draft.loaders.non_finite, to_buffers(draft.routes, draft.loaders)
            with OpenShards(tensors, shards, folder, recorder.on_layer, found, masks) as open_shards:
                ahead = checkpoint.files.read_ahead(options, draft.index.total_bytes)
                plan = _plan(draft, open_shards, sum(len(shard.offsets) for shard in shards), ahead.left(options))
                # What a library takes to read is in the draft's allowance already.
                plan = plan.beside(ahead.buffer_bytes, LIBRARY_BYTES if is_url(out) else 0)
                recorder.expect(plan, draft.assignments)
                planned.append(plan.memory)
                check_budget(plan.memory, options.max_memory)
                judge(plan.memory, memory_limits()).check("the conversion", options.force)
                reader = PieceReader(
                    source,
                    draft.index.shards,
                    workers=plan.workers,
                    chunk_bytes=plan.chunk_bytes,
                    on_progress=recorder.on_bytes,
                )
                open_shards.begin()
                totals = reader.run(plan.pieces)
                recorder.begin("finish")
                open_shards.check_complete()
            _write_surroundings(folder, source, [*small, *(each for each in papers if each != CARD)], shards, config)
            read_by = _read_by(tensors, export)
            if model_card:
                command = command_line(checkpoint, quantization, export.name, given, size)
                said = Conversion(command, draft.rules.name, export.name, described(draft.assignments), read_by)
                original = b"".join(_content(source, CARD)).decode(errors="replace") if CARD in papers else None
                folder.write(CARD, [make_card(original, *base_model(checkpoint), said).encode()])
            checkpoint.files.check_unchanged()
            output_bytes = folder.size()
            folder.publish()
    report = recorder.report(
        checkpoint.model_id,
        draft.rules.name,
        totals,
        files.nbytes,
        _meta_bytes,
        non_finite=draft.non_finite(),
    )
    checkpoint.files.tell(report.note_source)
    report.fit = None if fitted is None else fitted.report()
    report.predicted_final_bytes = report.final_bytes
    report.output, report.read_by = shown(out) if isinstance(out, str) and is_url(out) else str(out), read_by
    report.output_bytes = output_bytes
    report.documents = sorted({CARD, *papers}) if model_card else []
    return report


def _read_by(tensors: Sequence[PlannedTensor], export: ExportFormat) -> list[str]:
    """The tools that read what is written."""
    quantized = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor)]
    if any(tensor.assignment.kind == "embedding" for tensor in quantized):
        return ["quantload"]  # no other tool was seen to read a table of codes
    formats = {
        kind: {tensor.layout.format.name for tensor in quantized if tensor.assignment.kind == kind}
        for kind in ("linear", "experts")
    }
    return export.read_by(formats["linear"], formats["experts"])


@collector_paused()
def _plan(draft: Draft, open_shards: OpenShards, written: int, options: LoadOptions) -> LoadPlan:
    """Pieces of what is left to convert, and the memory it takes: a worker's buffers, and one that it writes from.

    `written` is how many tensors come out.
    """
    spans, sinks = open_shards.spans, open_shards.sinks
    plain = plan_pieces(open_shards.entries, spans, sinks, options.chunk_bytes)
    stored = plan_stored(open_shards.stored, spans, sinks, {}, options.chunk_bytes, draft.schemes.dequantizer)
    pieces = plain.pieces + stored.pieces
    chunk = max((piece.nbytes for piece in pieces), default=MIN_CHUNK)
    chunk = max(chunk, stored.scratch_bytes, min(options.chunk_bytes, 1 << 20))
    workers, staging = plan_staging(options, chunk, len(pieces), slots_per_worker(CPU) + 1)
    slack = draft.plan.memory.slack_bytes + (workers + 1) * stored.held_bytes
    slack += max(plain.maxima_bytes, stored.maxima_bytes)
    slack += WRITTEN_PIECES.beyond(len(pieces)) + WRITTEN_TENSORS.beyond(written)
    memory = replace(
        draft.plan.memory,
        final_bytes=0,
        staging_bytes=staging,
        slack_bytes=slack,
        peak_bytes=staging + slack,
        by_scheme={},
        quantizable_kept_bytes=0,
    )
    total = sum(piece.nbytes for piece in pieces)
    return LoadPlan(pieces, chunk, workers, memory, total, draft.plan.bytes_in, 0, draft.plan.leftovers)


def _output(out: str | Path) -> Callable[[str], OutputFolder]:
    """What makes the folder to write, here or elsewhere, for a key; raises for one that cannot be."""
    if isinstance(out, str) and is_url(out):
        return upload_to(out)
    folder = _folder_to_write(out)
    return lambda key: OutputFolder(folder, key)


def _folder_to_write(out: str | Path) -> Path:
    """The folder, with another name beside it that it has until it is finished; `PolicyError` where none can be."""
    folder = local_path(out, "the folder to write", PolicyError)
    if not Path(os.path.abspath(folder)).name:
        raise PolicyError(f"the folder to write is {str(out)!r}, the root of a file system; give one that is not there")
    local_path(folder.with_name(folder.name + UNFINISHED), "the folder to write, unfinished,", PolicyError)
    return folder


def _config(
    checkpoint: Checkpoint, draft: Draft, tensors: Sequence[PlannedTensor], export: ExportFormat
) -> dict[str, Any]:
    """The model's own config.json with a `quantization_config`."""
    config = draft.untied.config(checkpoint.config())
    config.pop("transformers_weights", None)  # the shards have the usual names
    config.pop("quantization_config", None)
    named = name_modules(draft.model, tensors, draft.routes)
    config["quantization_config"] = export.quantization_config(named)
    return config


def _warn_of_experts(tensors: Sequence[PlannedTensor], export: ExportFormat) -> None:
    """Say where a tool that reads the rest does not read quantized experts right."""
    formats = {
        tensor.layout.format.name
        for tensor in tensors
        if isinstance(tensor, QuantizedTensor) and tensor.assignment.kind == "experts"
    }
    unread = sorted(formats - export.experts_in_transformers)
    if unread:
        logger.warning(
            "transformers does not read experts in %s as %s writes them, and takes some codes for numbers without a "
            "word; vLLM and quantload read them (keep them for transformers with --experts none)",
            ", ".join(unread),
            export.name,
        )


def _warn_of_casts(draft: Draft, tensors: Sequence[PlannedTensor], export: ExportFormat) -> None:
    """Say where modeling code of transformers would cast the input of a layer to what another tool keeps as weight."""
    if export is OWN:  # read by quantload, whose layers say of their weights what the model computes in
        return
    codes = {
        tensor.assignment.name: tensor.layout.format.code_dtype
        for tensor in tensors
        if isinstance(tensor, QuantizedTensor) and tensor.assignment.kind == "linear"
    }
    cast = {
        name for dtype in {*codes.values()} for name in layers_cast_to(draft.model, dtype) if codes.get(name) == dtype
    }
    if cast:
        patterns = sorted({f"--ignore '*.{name.rpartition('.')[2]}'" for name in cast})
        logger.warning(
            "transformers casts the input of %d layers to the dtype of their weights, and %s has codes there: with the "
            "tool that reads it their outputs are wrong without a word, or an error (%s); vLLM and quantload are not "
            "concerned; keep the layers for transformers with %s",
            len(cast),
            export.name,
            some(cast),
            " ".join(patterns),
        )


def _key(
    checkpoint: Checkpoint,
    index: CheckpointIndex,
    shards: Sequence[ShardPlan],
    choices: list[Any],
) -> str:
    """What decides about the bytes that come out and the report: input files, planned headers, what was chosen."""
    said = hashlib.sha256(json.dumps([_KEY_VERSION, *choices]).encode())
    for shard in index.shards:
        said.update(" ".join(map(str, (shard.path, *checkpoint.files.version(shard.path)))).encode() + b"\n")
    for entry in index.tensors.values():
        said.update(f"{entry}\n".encode())
    for plan in shards:
        said.update(plan.path.encode() + plan.header)
    return said.hexdigest()


def _write_surroundings(
    folder: OutputFolder, source: Source, small: Sequence[str], shards: Sequence[ShardPlan], config: dict[str, Any]
) -> None:
    """Everything but the weights: tokenizer and other small files, index, config last."""
    for name in small:
        folder.write(name, _content(source, name))
    folder.write(INDEX_NAME, [_json(weight_index(shards))])
    folder.write(CONFIG_NAME, [_json(config)])


def _small_files(checkpoint: Checkpoint) -> list[str]:
    """What is to be copied; raises `UnsafePathError` where it is not in the folder, now rather than in the end."""
    names: list[str] = []
    checkpoint.files.gather(SMALL_FILES)
    for pattern in SMALL_FILES:
        for path in checkpoint.root.rglob(pattern):
            name = path.relative_to(checkpoint.root)
            hidden = any(part.startswith(".") or part.endswith(UNFINISHED) for part in name.parts)
            replaced = str(name) in (CONFIG_NAME, *QUANTIZATION_FILES) or name.name.endswith(".safetensors.index.json")
            if path.is_file() and not hidden and not replaced:
                locate(checkpoint.root, str(name))
                names.append(str(name))
    checkpoint.files.note(names)
    return names


def _content(source: Source, name: str) -> Iterator[bytearray]:
    size = source.size(name)
    for offset in range(0, size, source.read_bytes):
        yield read_bytes(source, name, offset, min(source.read_bytes, size - offset))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _meta_bytes(module: nn.Module) -> int:
    """Bytes the parameters of a module have in the model it was planned with."""
    return sum(parameter.nbytes for parameter in module.parameters())
