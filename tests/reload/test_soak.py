"""Many reloads of one model: what is held does not grow, and no bytes are left of the weights before."""

from __future__ import annotations

import ctypes
import gc
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from new_weights import changed_copy, load, pointers
from quantload import reload_weights
from quantload.digest import model_digest
from quantload.errors import NonFiniteWeightError
from quantload.memory.probes import AnonymousRssProbe
from test_update import in_parts, passing, tensors_of
from torch import Tensor

RELOADS, WARM = 200, 60
MOST_GROWTH = 4 << 20
"""Bytes that the process may have grown by in 140 reloads, each of which would keep 84 KB if it kept a model."""
MOST_SECONDS = 60
"""Of processors, for all reloads and what they are compared with."""


def given(way: int, folder: Path, seed: int) -> Any:
    """The weights of a folder, in one of the ways in which they can be given."""
    if way == 0:
        return folder
    tensors = tensors_of(folder)
    if way == 1:
        return tensors
    return passing(tensors.items() if way == 2 else in_parts(tensors, random.Random(seed)))


def give_back() -> None:
    """Let glibc return what was freed: it keeps up to 4 MiB for each thread that allocates while others do."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


@pytest.mark.slow
def test_reloads_neither_grow_nor_leave_anything(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("quantload"), "level", logging.CRITICAL)  # pytest keeps all lines
    architecture, scheme, rng = "qwen3_moe", "nvfp4", random.Random(5)

    def scaled(factor: float) -> Callable[[str, Tensor], Tensor]:
        return lambda name, tensor: (tensor.float() * factor).to(tensor.dtype) if tensor.is_floating_point() else tensor

    folders = [changed_copy(checkpoint(architecture), tmp_path / f"{n}", scaled(0.7 + 0.17 * n)) for n in range(4)]
    digests = [model_digest(load(folder, scheme), 1)[0] for folder in folders]
    bad = dict(tensors_of(folders[0]))
    last = next(name for name in reversed(bad) if name.endswith("down_proj.weight"))
    bad[last] = torch.full_like(bad[last], torch.nan)
    model = load(folders[0], scheme)
    where, probe, sizes, objects = pointers(model), AnonymousRssProbe(), [], []
    begin = time.process_time()
    for number in range(RELOADS):
        folder = rng.choice(range(4))
        way = number % 5
        if way == 4:
            with pytest.raises(NonFiniteWeightError):
                reload_weights(model, bad)
        reload_weights(model, given(way, folders[folder], folder), progress=False)
        assert model_digest(model, 1)[0] == digests[folder], number
        assert model.load_report.state == "complete"
        if number % 20 == 19:
            gc.collect()
            give_back()
            sizes.append(probe.current())
            objects.append(len(gc.get_objects()))
    assert time.process_time() - begin < MOST_SECONDS
    assert pointers(model) == where
    warm = WARM // 20 - 1
    assert max(sizes[warm:]) - sizes[warm] < MOST_GROWTH, sizes
    assert max(objects[warm:]) - objects[warm] < 500, objects
