"""How much the output of the demo model feels each kind of module, by depth: the table that `quantload --fit` ranks by.

One kind of one third of the layers is quantized at a time, all others are as stored, and the divergence from the BF16
model is measured on windows of held-out text, as `bench/quality.py` does it. It is divided by the mean relative squared
error of the weights that were quantized: what remains is the divergence that an error of 1 would cause if it grew in
proportion. The demo model has no dense feed-forward layers, so those are taken to be as sensitive as its experts. The
output head and the embedding are measured alike, each alone.

The mean relative squared error of all weights is measured in every scheme, too: the other factor of what a module is
expected to lose. `bench/fit.py` measures what `--fit` makes of these numbers.

    python bench/sensitivity.py
    python bench/sensitivity.py --only errors
    python bench/sensitivity.py --only exchanged  # what `--sensitivity` measures, without the stored model
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, headline
from quality import ROOT, WINDOW, Compared
from result_files import RESULTS, write_result

SCHEME = "nl4"


@dataclass(frozen=True)
class Row:
    """What one kind of module costs in one third of the layers."""

    kind: str
    third: str
    divergence: float
    relative_error: float
    modules: int

    @property
    def sensitivity(self) -> float:
        """Divergence for a relative squared error of 1."""
        return self.divergence / self.relative_error


@dataclass(frozen=True)
class Error:
    """The mean relative squared error of all weights in a scheme, and their bits with scales."""

    scheme: str
    relative_error: float
    bits: float


def measure_errors(folder: Path) -> list[Error]:
    """Of every scheme that quantizes all layers."""
    quantload, loss = importlib.import_module("quantload"), importlib.import_module("quantload.fit.expected_loss")
    found = []
    for scheme in loss.ERRORS:
        report = quantload.load_quantized(str(folder), scheme, device="cpu", progress=False).load_report
        weights = sum(layer.numel for layer in report.layers)
        if weights:
            bits = 8 * sum(layer.bytes_out for layer in report.layers) / weights
            found.append(Error(scheme, _relative_error(report.layers), bits))
            print(f"{scheme:16} {found[-1].relative_error:.2e} {bits:.2f} bits", flush=True)
    return found


def measure_exchanged(text: Path, folder: Path) -> dict[str, float]:
    """What `--sensitivity` finds, by exchanging codes of the model in NL4."""
    module = importlib.import_module("quantload.fit.sensitivity")
    with tempfile.TemporaryDirectory() as place:
        copied = Path(place) / text.name
        copied.write_text(text.read_text())
        found: dict[str, float] = module.measure_sensitivity(str(folder), copied, device="cpu", progress=False)
    for group, value in found.items():
        print(f"{group:16} {value:.3f}", flush=True)
    return found


def _relative_error(layers: Sequence[Any]) -> float:
    error: float = sum(10 ** (-layer.sqnr_db / 10) * layer.numel for layer in layers)
    weights: int = sum(layer.numel for layer in layers)
    return error / weights


def measure(folder: Path, text: str, windows: int) -> list[Row]:
    """Every kind in every third, then the head and the embedding."""
    transformers, quantload = importlib.import_module("transformers"), importlib.import_module("quantload")
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    step = (len(ids) - WINDOW) // max(windows - 1, 1)
    inputs = [ids[at : at + WINDOW][None] for at in range(0, step * windows, step)]
    baseline = Compared(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())
    with torch.inference_mode():
        for each in inputs:
            baseline(input_ids=each)

    def divergence_of(scheme: str, policy: Any = None) -> tuple[float, Any]:
        model = quantload.load_quantized(str(folder), scheme, device="cpu", policy=policy, progress=False)
        compared = Compared(model, iter(baseline.kept))
        with torch.inference_mode():
            for each in inputs:
                compared(input_ids=each)
        return sum(compared.divergences) / len(compared.divergences), model.load_report

    draft = quantload.plan_quantized(str(folder), SCHEME, device="cpu")
    groups: dict[tuple[str, str], list[str]] = {}
    for item in importlib.import_module("quantload.fit.expected_loss").items_of(draft):
        groups.setdefault((item.kind, item.third), []).extend(item.names)
    groups |= {("head", ""): ["lm_head"], ("embedding", ""): ["model.embed_tokens"]}
    rows = []
    for (kind, third), names in groups.items():
        policy = quantload.QuantizationPolicy(overrides=tuple((name, SCHEME) for name in names))
        divergence, report = divergence_of("none", policy)
        rows.append(Row(kind, third, divergence, _relative_error(report.layers), len(report.layers)))
        print(f"{kind:8} {third:6} {1000 * divergence:7.3f} {rows[-1].sensitivity:7.3f}", flush=True)
    return rows


def main() -> None:
    """Measure, print, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "loader" / "demo_model", help="folder of the demo model")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "stdlib_validation.txt")
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens, evenly over the text")
    parser.add_argument(
        "--only", choices=("errors", "exchanged", "kinds"), help="errors of weights, exchanged codes, or kinds alone"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = describe_machine()
    print(headline(machine))
    result: dict[str, Any] = {"machine": machine}
    if options.only in (None, "errors"):
        result["errors"] = [asdict(each) for each in measure_errors(options.model)]
    if options.only in (None, "exchanged"):
        result["exchanged"] = measure_exchanged(options.text, options.model)
    if options.only in (None, "kinds"):
        rows = measure(options.model, options.text.read_text(), options.windows)
        result |= {
            "windows": options.windows,
            "scheme": SCHEME,
            "rows": [{**asdict(row), "sensitivity": row.sensitivity} for row in rows],
        }
    print(f"\nwritten: {write_result('sensitivity', result, options.results, options.only or '')}")


if __name__ == "__main__":
    main()
