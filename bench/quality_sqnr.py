"""How much of weights of known distributions every format keeps, under each of its scale modes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measured_formats import MEASURED
from torch import Tensor

ROWS, COLUMNS = 4096, 4096
TOLERANCE_DB = 0.2

# What the arithmetic of each format is known to give on 4096 columns, in dB; more than 0.2 dB below is a defect.
EXPECTED_DB = {
    ("mxfp4", "gauss"): 19.0,
    ("mxfp4", "laplace"): 18.1,
    ("fp8_channel", "gauss"): 31.5,
    ("int8_channel", "gauss"): 41.0,
}


def _gauss(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=generator)


def _laplace(generator: torch.Generator) -> Tensor:
    uniform = torch.rand(ROWS, COLUMNS, generator=generator).sub_(0.5)
    tail = uniform.abs().mul_(-2).add_(1).clamp_(min=torch.finfo(torch.float32).tiny)
    return -uniform.sign() * tail.log()


def _student(degrees: int) -> Callable[[torch.Generator], Tensor]:
    def draw(generator: torch.Generator) -> Tensor:
        square = torch.zeros(ROWS, COLUMNS)
        for _ in range(degrees):
            square += torch.randn(ROWS, COLUMNS, generator=generator).square_()
        return torch.randn(ROWS, COLUMNS, generator=generator) / (square / degrees).sqrt_()

    return draw


DISTRIBUTIONS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "gauss": _gauss,
    "laplace": _laplace,
    "student-t 5": _student(5),
    "student-t 3": _student(3),
}


@dataclass(frozen=True)
class Sqnr:
    """One format on one distribution: dB from the dequantized matrix, and as the kernel's statistics tell it."""

    format: str
    scale_mode: str
    distribution: str
    bits_per_weight: float
    db: float
    kernel_db: float
    expected_db: float | None

    @property
    def met(self) -> bool | None:
        """Whether the expected value is reached; None where none is known."""
        return None if self.expected_db is None else self.db >= self.expected_db - TOLERANCE_DB


def measure_sqnr(seed: int) -> list[Sqnr]:
    """Every format on every distribution, but for those that hold the values of another one (E4M3 FNUZ)."""
    formats = importlib.import_module("quantload.kernels.formats").FORMATS
    found = []
    for distribution, draw in DISTRIBUTIONS.items():
        weights = draw(torch.Generator().manual_seed(seed)).mul_(0.02).to(torch.bfloat16)
        for name in (each for each in MEASURED if formats[each].ocp is None):
            found += [_sqnr(name, mode, distribution, weights) for mode in formats[name].scale_modes]
    return found


def _sqnr(name: str, mode: str, distribution: str, weights: Tensor) -> Sqnr:
    registry = importlib.import_module("quantload.kernels.registry")
    statistics_module = importlib.import_module("quantload.kernels.statistics")
    kernels = registry.kernel_set(name, "cpu", scale_mode=mode)
    tensors = kernels.format.empty(*weights.shape)
    statistics = statistics_module.new_statistics()
    if kernels.quantize(weights, tensors, statistics):
        raise ValueError(f"{name} found NaN or infinity in finite {distribution} weights")
    out = torch.empty(weights.shape, dtype=torch.float32)
    kernels.dequantize(tensors, out)
    signal = weights.double().square_().sum()
    noise = (weights.double() - out).square_().sum()
    return Sqnr(
        format=name,
        scale_mode=mode,
        distribution=distribution,
        bits_per_weight=8 * kernels.format.bytes(*weights.shape) / weights.numel(),
        db=10 * math.log10(float(signal / noise)),
        kernel_db=statistics_module.sqnr_db(statistics),
        expected_db=EXPECTED_DB.get((name, distribution)) if mode == "default" else None,
    )
