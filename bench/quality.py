"""What each scheme costs in quality: perplexity of the demo model, and SQNR on weights of known distributions.

The perplexity is that of the demo model's card: windows of 512 tokens every 256, each token of the held-out text scored
once. The SQNR compares BF16 weights with what their codes stand for, computed here in float64 from the dequantized
matrix, beside what the kernel says it measured on the way.

    python bench/quality.py
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from goals import columns
from machine import describe_machine, headline
from result_files import RESULTS, write_result
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
WINDOW, STRIDE = 512, 256
BASELINE = "BF16 (transformers)"
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
class Perplexity:
    """One scheme on the demo model; `sqnr_db` is the mean over its quantized modules, weighted by their elements."""

    scheme: str
    perplexity: float
    bits_per_byte: float
    change: float
    final_bytes: int
    sqnr_db: float | None
    quantized_modules: int


@dataclass(frozen=True)
class Sqnr:
    """One format on one distribution: dB from the dequantized matrix, and as the kernel's statistics tell it."""

    format: str
    distribution: str
    db: float
    kernel_db: float
    expected_db: float | None

    @property
    def met(self) -> bool | None:
        """Whether the expected value is reached; None where none is known."""
        return None if self.expected_db is None else self.db >= self.expected_db - TOLERANCE_DB


def _bytes(model: Any) -> int:
    sizes = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(sizes.values())


def _mean_sqnr(layers: Sequence[Any]) -> float | None:
    known = [
        (layer.sqnr_db, layer.numel) for layer in layers if layer.sqnr_db is not None and math.isfinite(layer.sqnr_db)
    ]
    total = sum(numel for _, numel in known)
    return sum(db * numel for db, numel in known) / total if total else None


def measure_perplexity(folder: Path, text: str) -> list[Perplexity]:
    """The demo model as transformers loads it, then under every registered scheme."""
    transformers = importlib.import_module("transformers")
    quantload = importlib.import_module("quantload")
    registry = importlib.import_module("quantload.schemes.registry")
    transformers.logging.disable_progress_bar()
    validation_loss = importlib.import_module("train_demo").validation_loss
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    found: list[Perplexity] = []
    for scheme in (BASELINE, *(entry.name for entry in registry.ENTRIES)):
        if scheme == BASELINE:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        else:
            model = quantload.load_quantized(str(folder), quantization=scheme, device="cpu")
        led = torch.cat([torch.tensor([model.config.eos_token_id]), ids])
        loss, tokens = validation_loss(model, led, WINDOW, STRIDE)
        report = getattr(model, "load_report", None)
        layers = report.layers if report is not None else []
        perplexity = math.exp(loss / tokens)
        print(f"{scheme}: perplexity {perplexity:.3f}", file=sys.stderr, flush=True)
        found.append(
            Perplexity(
                scheme=scheme,
                perplexity=perplexity,
                bits_per_byte=loss / math.log(2) / len(text.encode()),
                change=perplexity / found[0].perplexity - 1 if found else 0.0,
                final_bytes=_bytes(model),
                sqnr_db=_mean_sqnr(layers),
                quantized_modules=len(layers),
            )
        )
    return found


def measure_sqnr(seed: int) -> list[Sqnr]:
    """Every format on every distribution."""
    formats = importlib.import_module("measured_formats").MEASURED
    found = []
    for distribution, draw in DISTRIBUTIONS.items():
        weights = draw(torch.Generator().manual_seed(seed)).mul_(0.02).to(torch.bfloat16)
        found += [_sqnr(format_name, distribution, weights) for format_name in formats]
    return found


def _sqnr(format_name: str, distribution: str, weights: Tensor) -> Sqnr:
    registry = importlib.import_module("quantload.kernels.registry")
    statistics_module = importlib.import_module("quantload.kernels.statistics")
    kernels = registry.kernel_set(format_name, "cpu")
    codes = torch.empty(kernels.format.code_shape(*weights.shape), dtype=kernels.format.code_dtype)
    scales = torch.empty(kernels.format.scale_shape(*weights.shape), dtype=kernels.format.scale_dtype)
    statistics = statistics_module.new_statistics()
    if kernels.quantize(weights, codes, scales, statistics):
        raise ValueError(f"{format_name} found NaN or infinity in finite {distribution} weights")
    out = torch.empty(weights.shape, dtype=torch.float32)
    kernels.dequantize(codes, scales, out)
    signal = weights.double().square_().sum()
    noise = (weights.double() - out).square_().sum()
    return Sqnr(
        format=format_name,
        distribution=distribution,
        db=10 * math.log10(float(signal / noise)),
        kernel_db=statistics_module.sqnr_db(statistics),
        expected_db=EXPECTED_DB.get((format_name, distribution)),
    )


def print_perplexity(rows: Sequence[Perplexity]) -> None:
    """The perplexity table."""
    cells = [
        [
            row.scheme,
            f"{row.perplexity:.3f}",
            f"{row.change:+.2%}",
            f"{row.bits_per_byte:.4f}",
            f"{row.final_bytes / 1e6:.2f}",
            "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
            str(row.quantized_modules),
        ]
        for row in rows
    ]
    print("\nDemo model on the held-out text")
    print(columns(cells, ("scheme", "perplexity", "change", "bits/byte", "MB", "SQNR dB", "quantized modules")))


def print_sqnr(rows: Sequence[Sqnr]) -> None:
    """The SQNR table: formats down, distributions across, then the expected values."""
    by_key = {(row.format, row.distribution): row for row in rows}
    formats = list(dict.fromkeys(row.format for row in rows))
    cells = [[name, *(f"{by_key[name, distribution].db:.2f}" for distribution in DISTRIBUTIONS)] for name in formats]
    print(f"\nSQNR in dB of {ROWS}x{COLUMNS} BF16 weights")
    print(columns(cells, ("format", *DISTRIBUTIONS)))
    for row in rows:
        if row.expected_db is not None:
            verdict = "met" if row.met else "NOT met"
            print(f"{row.format} on {row.distribution}: {row.db:.2f}, expected {row.expected_db:.1f}: {verdict}")
    off = max(abs(row.db - row.kernel_db) for row in rows)
    print(f"largest difference to the kernels' own statistics: {off:.4f} dB")


def main() -> None:
    """Measure, print the tables, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "loader" / "demo_model", help="folder of the demo model")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "stdlib_validation.txt")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0, help="of the weights the SQNR is measured on")
    parser.add_argument("--only", choices=("perplexity", "sqnr"), help="one of the two tables")
    options = parser.parse_args()
    machine = describe_machine()
    print(headline(machine))
    result: dict[str, Any] = {"machine": machine, "seed": options.seed}
    if options.only != "sqnr":
        perplexities = measure_perplexity(options.model, options.text.read_text())
        print_perplexity(perplexities)
        result["perplexity"] = [asdict(row) for row in perplexities]
    if options.only != "perplexity":
        sqnrs = measure_sqnr(options.seed)
        print_sqnr(sqnrs)
        result["sqnr"] = [{**asdict(row), "met": row.met} for row in sqnrs]
    print(f"\nwritten: {write_result('quality', result, options.results)}")


if __name__ == "__main__":
    main()
