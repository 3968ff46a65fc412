"""How much the output of a model feels each kind of module at each depth, measured on a text.

The model is streamed once, in NL4, the smallest scheme of `--fit`. Then codes of one kind of module in a third of the
layers are exchanged for their neighbours, here and there, and the divergence of the predictions from those before it is
divided by the relative squared error that this is of the weights. Exchanging the same codes again brings them back, so
that nothing is kept of them: the model, one pass and the predictions before, of which the `KEPT` most likely tokens are
kept, are all the memory that it takes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache.key import entry_key
from ..checkpoint.folder import Checkpoint
from ..checkpoint.resolve import resolved
from ..errors import PolicyError
from ..kernels.nl4_levels import LEVELS
from ..load import load_quantized
from ..local_paths import local_path
from ..model.quantized import quantized_modules
from ..options import QuantizationPolicy
from ..progress import Progress
from ..schemes.base import MoEScheme
from .expected_loss import grouped
from .text_windows import WINDOW, read_text, text_windows

logger = logging.getLogger("quantload")
SCHEME = "nl4"
VERSION = 1
"""Of what is measured; raise it with every change after which a model has other sensitivities."""
MOST_WINDOWS = 4
KEPT = 256
"""Of the predictions for a token: of all others together the sum is kept."""
EXCHANGED = 20
"""Of 256 codes: so many that the error is near to that of rounding to NL4."""
CHUNK = 1 << 22
"""Bytes of codes that are exchanged at once."""


class Predictions(NamedTuple):
    """Log-probabilities [tokens, KEPT + 1] of the most likely tokens, and of all others together; their ids."""

    likely: Tensor
    others: Tensor
    ids: Tensor


def measure_sensitivity(
    model_id: str | Path | Checkpoint,
    text: str | Path,
    *,
    each: bool = False,
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
) -> dict[str, float]:
    """The divergence in nats a token for a relative squared error of 1, by kind and third, such as `"qkv first"`.

    With `each` it is that of each module, or of those that get one scheme together, such as `"model.layers.3 qkv"`, for
    which each takes a pass over the text of its own. For `LoadOptions.fit_sensitivity`. `text` is a file of what the
    model is for, a few thousand tokens of it; what was measured is left beside it in a file whose name has a key of
    model and text, and is read from there the next time. The log says how long it will take. Raises `PolicyError` for a
    text that is too short, and `UnsupportedCheckpointError` and `CheckpointError` for models that do not predict tokens
    of a text.
    """
    path = local_path(text, "the text", PolicyError)
    content = read_text(path)
    with resolved(model_id, revision) as checkpoint:
        if checkpoint.is_quantized:
            raise PolicyError("sensitivity is for checkpoints in BF16, FP16 or FP32; this one is quantized already")
        kept = path.with_name(f"{path.name}.{_key(checkpoint, content, trust_remote_code, each)[:16]}.json")
        if kept.exists():
            return read_sensitivity(kept)
        windows = text_windows(checkpoint, content, trust_remote_code, "sensitivity", WINDOW, MOST_WINDOWS)
        model: Any = load_quantized(
            checkpoint, SCHEME, device=device, trust_remote_code=trust_remote_code, progress=progress
        )
    found = _measured(model, windows, each)
    del model
    gc.collect()  # before the load that it is for
    try:
        kept.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        logger.warning("What was measured is not kept: %s cannot be written (%s)", kept, error.strerror)
    return found


def read_sensitivity(path: Path) -> dict[str, float]:
    """What was measured before. Raises `PolicyError` for a file of something else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path} has no sensitivities: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(value, int | float) for value in values.values()):
        raise PolicyError(f"{path} has no sensitivities: remove it, and they are measured anew")
    return {name: float(value) for name, value in values.items()}


def _key(checkpoint: Checkpoint, text: str, trust_remote_code: bool, each: bool) -> str:
    model = entry_key(checkpoint, QuantizationPolicy(SCHEME), (), trust_remote_code)
    return hashlib.sha256(f"{VERSION} {'each ' if each else ''}{model} {text}".encode()).hexdigest()


@torch.inference_mode()
def _measured(model: Any, windows: Sequence[Tensor], each: bool = False) -> dict[str, float]:
    """The sensitivity of each kind in each third of the layers of a model in NL4, or of each item."""
    modules = {name: module for name, module in quantized_modules(model) if module.scheme.name == SCHEME}
    items = grouped(list(modules), {name for name, module in modules.items() if isinstance(module.scheme, MoEScheme)})
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(item.name if each else item.group, []).extend(item.names)
    begin = time.perf_counter()
    before = [_predicted(model, window) for window in windows]
    seconds, tokens = time.perf_counter() - begin, sum(window.shape[1] for window in windows)
    logger.info(
        "Sensitivity: %d %s, on %d tokens: about %.0f s",
        *(len(groups), "modules" if each else "kinds of modules by depth", tokens, seconds * len(groups)),
    )
    found = {}
    for number, (group, names) in enumerate(groups.items(), start=1):
        with _exchanged([modules[name] for name in names]) as error:
            lost = [_divergence(model, window, base) for window, base in zip(windows, before, strict=True)]
        found[group] = float(torch.cat(lost).mean()) / error if error else 0.0
        left = (time.perf_counter() - begin) / (number + 1) * (len(groups) - number)
        logger.info(
            "Sensitivity: %s: %.3f; %d of %d, about %.0f s left",
            *(group, found[group], number, len(groups), left),
        )
    return found


def _predicted(model: Any, window: Tensor) -> Predictions:
    """The most likely tokens after each token of a window."""
    logs = _log_probabilities(model, window)
    likely, ids = logs.topk(min(KEPT, logs.shape[-1]), dim=-1)
    return Predictions(likely, _others(likely), ids)


def _divergence(model: Any, window: Tensor, base: Predictions) -> Tensor:
    """The divergence after each token from what was predicted before; all other tokens count as one."""
    likely = _log_probabilities(model, window).gather(-1, base.ids)
    each = (base.likely.exp() * (base.likely - likely)).sum(-1)
    return each + base.others.exp() * (base.others - _others(likely))


def _others(likely: Tensor) -> Tensor:
    """The logarithm of what is left for all other tokens."""
    return (1 - likely.exp().sum(-1)).clamp_min(1e-7).log()


def _log_probabilities(model: Any, window: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=window.to(model.device), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


@contextmanager
def _exchanged(modules: Sequence[Any]) -> Iterator[float]:
    """Exchange some codes for their neighbours, and give the relative squared error of that; afterwards all is back."""
    codes = [tensor for module in modules for tensor in _codes(module)]
    noise, signal = 0.0, 0.0
    for number, tensor in enumerate(codes):
        changed, all_of_it = _exchange(tensor, number, counting=True)
        noise, signal = noise + changed, signal + all_of_it
    try:
        yield noise / signal if signal else 0.0
    finally:
        for number, tensor in enumerate(codes):
            _exchange(tensor, number, counting=False)


def _codes(module: Any) -> Iterator[Tensor]:
    """The codes of a module, two in a byte, flat; without those that fill up rows."""
    for key, layout in module.scheme.layouts(module).items():
        if layout.columns % 32 == 0:
            yield module.scheme.weight(module, layout, key)[0].view(-1)


def _exchange(codes: Tensor, seed: int, *, counting: bool) -> tuple[float, float]:
    """Exchange codes with those that differ in the last bit, the neighbours of an odd or even level, chosen by a seed.

    The squared error, and the squares of all weights, without scales: those of blocks are taken to be alike.
    """
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    squares = torch.tensor([low * low for low in LEVELS], dtype=torch.float64)
    steps = (levels - levels[torch.arange(16) ^ 1]).square().double()
    noise = signal = 0.0
    for begin in range(0, codes.numel(), CHUNK):
        part = codes[begin : begin + CHUNK]
        drawn = torch.randint(0, 256, (2, part.numel()), dtype=torch.uint8, generator=generator) < EXCHANGED
        mask = (drawn[0].to(torch.uint8) | (drawn[1].to(torch.uint8) << 4)).to(part.device)
        if counting:
            for shift, chosen in ((0, drawn[0]), (4, drawn[1])):
                nibbles = ((part >> shift) & 15).cpu().long()
                signal += float(squares @ torch.bincount(nibbles, minlength=16).double())
                noise += float(steps @ torch.bincount(nibbles[chosen], minlength=16).double())
        part ^= mask
    return noise, signal
