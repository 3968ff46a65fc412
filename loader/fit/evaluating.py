"""`quantload eval`: what schemes do to a model, measured on a text against the model as it is stored.

One model is in memory at a time, each streamed from the checkpoint: first the reference, then one after the other.
The reference's predictions are kept for the others in a temporary file, in 16 bits for each position of the text and
each word of the vocabulary: all of them, so that the divergence is exact, and on disk, as a vocabulary of 150,000 words
makes 300 KB of a position. To ask the reference again instead, two models would have to be in memory at once, or one
would have to be loaded for each part of the text.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..checkpoint.folder import Checkpoint
from ..checkpoint.resolve import resolved
from ..draft import plan_draft
from ..errors import PolicyError
from ..load import load_quantized
from ..local_paths import local_path
from ..memory.amounts import format_bytes
from ..options import LoadOptions, QuantizationPolicy, check_kinds, without_fit
from ..progress import Progress
from ..schemes.names import AUTO, known_name
from ..schemes.registry import AS_STORED, get_entry
from .kept_predictions import LEAST, KeptPredictions
from .policy import apply_fit, candidate
from .text_windows import FEWEST_TOKENS, WINDOW, read_text, text_windows

logger = logging.getLogger("quantload")
TOKENS = 4096
AT_ONCE = 64
"""Positions whose predictions are in float32 at one time."""


@dataclass(frozen=True)
class Evaluated:
    """A model in one scheme, or several: bytes in the end, the predicted peak of its load, what it makes of the text.

    `divergence` is the mean Kullback-Leibler divergence of its predictions from the reference's, in nats a token, and
    `divergence_error` the standard error of that mean; `same_token` is how often both find the same token most likely.
    `seconds` are those of its forwards.
    """

    name: str
    final_bytes: int
    peak_bytes: int
    perplexity: float
    divergence: float
    divergence_error: float
    same_token: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """The reference and others, on `windows` parts of a text with so many tokens together."""

    model: str
    tokens: int
    windows: int
    reference: Evaluated
    schemes: tuple[Evaluated, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate_schemes(
    model_id: str | Path | Checkpoint,
    text: str | Path,
    schemes: Sequence[str] = (),
    *,
    policies: Mapping[str, QuantizationPolicy] | None = None,
    reference: str = AS_STORED,
    tokens: int = TOKENS,
    device: str | torch.device = "auto",
    policy: QuantizationPolicy | None = None,
    options: LoadOptions | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
) -> Evaluation:
    """Perplexity and divergence of a model in each of `schemes`, from that in `reference`, on a text.

    `text` is a file, of which about `tokens` tokens are looked at, in parts of at most 512 from all over it. `policy`
    says what else counts for `schemes`, such as what is ignored; `policies` are others, by the names they get, and what
    is chosen where `options` have a `fit` is one more. One model is in memory at a time. Raises `PolicyError` for a
    text that is too short and for schemes that cannot be loaded, before anything is; `MemoryBudgetError` where one does
    not fit, which the reference may not: then give one that does.
    """
    check_kinds(policy, options)
    path = local_path(text, "the text", PolicyError)
    if tokens < FEWEST_TOKENS:
        raise PolicyError(f"tokens is {tokens}; eval needs {FEWEST_TOKENS}, better a few thousand")
    options = options or LoadOptions()
    where: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    with resolved(model_id, revision) as checkpoint:
        windows = text_windows(checkpoint, read_text(path), trust_remote_code, "eval", WINDOW, -(-tokens // WINDOW))
        count = sum(each.shape[1] for each in windows)
        candidates = [
            _of_scheme(reference, None),
            *dict(_of_scheme(name, policy) for name in schemes).items(),
            *(policies or {}).items(),
            *_fitted(checkpoint, policy, options, where),
        ]
        options = without_fit(options)
        for _, each in candidates:
            with candidate():
                plan_draft(checkpoint, AUTO, policy=each, options=options, **where)
        found: list[Evaluated] = []
        with KeptPredictions.of(count) as kept:
            for name, each in candidates:
                model: Any = load_quantized(checkpoint, policy=each, options=options, progress=progress, **where)
                found.append(_evaluated(name, model, windows, kept, is_first=not found))
                del model
                gc.collect()  # the next one takes its place
                _tell(found, len(candidates))
    return Evaluation(checkpoint.model_id, count, len(windows), found[0], tuple(found[1:]))


def _of_scheme(scheme: str, policy: QuantizationPolicy | None) -> tuple[str, QuantizationPolicy]:
    """A scheme for all modules that get one, and its own name."""
    name = known_name(scheme)
    return name if name == AUTO else get_entry(name).name, replace(policy or QuantizationPolicy(), linear=name)


def _fitted(
    checkpoint: Checkpoint, policy: QuantizationPolicy | None, options: LoadOptions, where: Mapping[str, Any]
) -> Iterator[tuple[str, QuantizationPolicy]]:
    """What is chosen for a size, if there is one."""
    _, _, fitted = apply_fit(checkpoint, AUTO, policy, options, **where)
    if fitted is not None:
        yield f"fit {format_bytes(fitted.room.size)}", fitted.policy


def _tell(found: Sequence[Evaluated], count: int) -> None:
    last, done = found[-1], len(found)
    logger.info(
        "Eval: %s: perplexity %.3f, divergence %.5f; %d of %d, about %.0f s of computing left",
        *(last.name, last.perplexity, last.divergence, done, count),
        sum(each.seconds for each in found) / done * (count - done),
    )


@torch.inference_mode()
def _evaluated(name: str, model: Any, windows: Sequence[Tensor], kept: KeptPredictions, is_first: bool) -> Evaluated:
    """What a model makes of the text; of the first one it is kept, the others are compared with that."""
    report, begin = model.load_report, time.perf_counter()
    losses: list[Tensor] = []
    divergences: list[Tensor] = []
    same: list[Tensor] = []
    kept.rewind()
    for window in windows:
        logits = model(input_ids=window.to(model.device), use_cache=False).logits[0]
        if is_first and window is windows[0]:
            kept.expect(logits.shape[-1])
        following = torch.cat([window[0, 1:], window[0, :1]])  # of the last one nothing counts
        for part, wanted in zip(logits.split(AT_ONCE), following.split(AT_ONCE), strict=True):
            logs = part.float().log_softmax(-1).cpu()
            losses.append(functional.nll_loss(logs, wanted, reduction="none"))
            if is_first:
                kept.write(logs)
                continue
            base = kept.read(logs)
            divergences.append((base.exp() * (base - logs.clamp_min(LEAST))).sum(-1))
            same.append(base.argmax(-1) == logs.argmax(-1))
        losses[-1] = losses[-1][:-1]
    each = torch.zeros(1) if is_first else torch.cat(divergences)
    return Evaluated(
        name=name,
        final_bytes=report.final_bytes,
        peak_bytes=report.predicted_peak_bytes,
        perplexity=math.exp(float(torch.cat(losses).double().mean())),
        divergence=float(each.double().mean()),
        divergence_error=float(each.double().std(correction=0)) / math.sqrt(len(each)),
        same_token=1.0 if is_first else float(torch.cat(same).double().mean()),
        seconds=time.perf_counter() - begin,
    )
