"""Values that are not ordinary: what every format makes of the ends of a type, and what it costs to look for NaN.

python bench/values.py                  # a few minutes; the result goes to bench/results
python bench/values.py --scale 0.01     # a small checkpoint, for trying the script

Extremes: matrices of the largest and smallest numbers of BF16, FP16 and FP32 through every format, scale mode and
kernel that runs here; a case is right if all values are finite in float32, in BF16 and in the type of the weights, and
the kernel's own signal, noise and largest error are those of the values. Cost: a dense checkpoint is loaded as it is
(`none`: every byte is looked at) and as `quark_mxfp4`, with the look and without, in turns, page cache warm.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from checkpoints import WORK_FOLDER, make
from machine import describe_machine
from quantload import LoadOptions, load_quantized
from quantload.kernels import statistics as st
from quantload.kernels.formats import FORMATS, SCALE_MODES
from quantload.kernels.registry import OPERATIONS, candidates, kernel_set
from quantload.online.non_finite import NonFiniteValues
from result_files import RESULTS, write_result
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPE = 130, 320
LOOK = "with the look", "without"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the checkpoint, 1 for the usual one")
    parser.add_argument("--runs", type=int, default=9, help="loads of each kind")
    parser.add_argument("--work", type=Path, default=WORK_FOLDER, help="folder for the checkpoint")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    chosen = parser.parse_args(arguments)
    counts, wrong = extremes()
    folder = make("dense", chosen.scale, chosen.work)
    costs = [cost(folder, scheme, chosen.runs) for scheme in ("none", "quark_mxfp4")]
    result = {
        "machine": describe_machine(),
        "settings": {"scale": chosen.scale, "runs": chosen.runs},
        "extremes": {"cases": dict(counts), "wrong": wrong},
        "cost": costs,
    }
    path = write_result("values", result, chosen.out, "" if chosen.scale == 1 else "part")
    print(f"{path}: {sum(counts.values())} cases, {len(wrong)} wrong")
    for row in costs:
        print(f"{row['scheme']}: {row['seconds']}, ratio {row['ratio']:.3f}")
    return int(bool(wrong))


def matrices(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Weights of a dtype with some of its largest and smallest numbers."""
    info, generator = torch.finfo(dtype), torch.Generator().manual_seed(0)
    usual = torch.randn(SHAPE, generator=generator) * 0.02
    signs = torch.randint(0, 2, SHAPE, generator=generator) * 2.0 - 1
    for name, value in (("max", info.max), ("min", info.min), ("subnormal", info.smallest_normal / 4)):
        changed = usual.clone()
        changed[3, 5] = value
        yield f"one {name}", changed.to(dtype)
    yield "all max or min", (signs * info.max).to(dtype)
    yield "all sizes up to max", ((torch.rand(SHAPE, generator=generator) * 2 - 1) * info.max).to(dtype)
    yield "smallest normal numbers", (signs * info.smallest_normal).to(dtype)
    yield "zeros", torch.zeros(SHAPE).to(dtype)


def extremes() -> tuple[Counter[str], list[str]]:
    """Cases by kernel, and those that are wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for mode, names in SCALE_MODES.items():
        for name in names:
            for kernel in [k.name for k, reason in candidates("quantize", name, "cpu", mode) if reason is None]:
                kernels = kernel_set(name, "cpu", dict.fromkeys(OPERATIONS[:4], kernel), scale_mode=mode)
                for dtype in DTYPES:
                    for said, source in matrices(dtype):
                        counts[kernel] += 1
                        if not is_right(kernels, source):
                            wrong.append(f"{name} {mode} {kernel} {dtype} {said}")
    return counts, wrong


def is_right(kernels: Any, source: Tensor) -> bool:
    """Whether values are finite, and what was measured is what they are."""
    measured = st.new_statistics()
    tensors = FORMATS[kernels.format.name].empty(*source.shape)
    if kernels.quantize(source, tensors, measured):
        return False
    values = {dtype: torch.empty(source.shape, dtype=dtype) for dtype in {torch.float32, torch.bfloat16, source.dtype}}
    for out in values.values():
        kernels.dequantize(tensors, out)
    x, error = source.double(), (source.double() - values[torch.float32].double()).abs()
    signal, noise, largest = (float(each) for each in (x.square().sum(), error.square().sum(), x.abs().max()))
    # What float32 sums keep of a noise that is small beside its signal, and of squares that are subnormal.
    allowed = {
        st.SIGNAL: (signal, 1e-4 * signal + 1e-70),
        st.NOISE: (noise, 2e-3 * noise + 1e-13 * signal + 1e-70),
        st.MAX_ERROR: (float(error.max()), 1e-3 * float(error.max()) + 1e-6 * largest),
        st.AMAX: (largest, 0.0),
    }
    close = all(abs(float(measured[index]) - wanted) <= margin for index, (wanted, margin) in allowed.items())
    return close and all(bool(out.isfinite().all()) for out in values.values())


def cost(folder: Path, scheme: str, runs: int) -> dict[str, Any]:
    """Median seconds of a load with the look for NaN and without it, in turns."""
    seconds: dict[str, list[float]] = {how: [] for how in LOOK}
    for number in range(runs + 1):
        for how in LOOK if number % 2 else LOOK[::-1]:
            seconds[how].append(_load(folder, scheme, looks=how == LOOK[0]))
    medians = {how: statistics.median(values[1:]) for how, values in seconds.items()}
    return {"scheme": scheme, "seconds": medians, "ratio": medians[LOOK[0]] / medians[LOOK[1]], "all": seconds}


def _load(folder: Path, scheme: str, looks: bool) -> float:
    def passed_over(*_: Any, **__: Any) -> None: ...

    look = NonFiniteValues.look if looks else passed_over
    with mock.patch.object(NonFiniteValues, "look", look):
        start = time.perf_counter()
        load_quantized(folder, scheme, options=LoadOptions(page_cache="keep"))
        return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
