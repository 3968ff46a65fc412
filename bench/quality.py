"""What each scheme costs in quality: the demo model's text under it, and SQNR on weights of known distributions.

Every registered scheme, with its own scales and with those of the least squared error where it has them, and with
activations rounded to each format that goes with its weights. The perplexity is that of the demo model's card: windows
of 512 tokens every 256, each token of the held-out text scored once. The divergence is the mean Kullback-Leibler
divergence, over every position of every window, of the predictions from those of the BF16 model; it tells schemes
apart whose perplexities differ by less than chance. The SQNR compares BF16 weights with what their codes stand for,
computed here in float64 from the dequantized matrix, beside what the kernel says it measured on the way.

    python bench/quality.py
    python bench/quality.py --only perplexity --schemes quark_mxfp4 nl4
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, headline
from quality_sqnr import measure_sqnr
from quality_tables import BASELINE, Variant, print_best, print_sqnr, print_variants
from result_files import RESULTS, write_result
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
WINDOW, STRIDE = 512, 256


class Compared:
    """A model whose predictions are kept, or compared with those another one made of the same windows in turn."""

    def __init__(self, model: Any, expected: Iterator[Tensor] | None = None) -> None:
        self.model = model
        self.expected = expected
        self.kept: list[Tensor] = []
        self.divergences: list[float] = []

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        predicted = functional.log_softmax(output.logits[0].float(), dim=-1)
        if self.expected is None:
            self.kept.append(predicted.half())
        else:
            wanted = functional.log_softmax(next(self.expected).float(), dim=-1)
            each = functional.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1)
            self.divergences += each.tolist()
        return output


def variants() -> Iterator[tuple[str, str, str]]:
    """(scheme, scale mode, activations) of everything that the registries offer."""
    schemes, kernels, activations = (
        importlib.import_module(f"quantload.{name}")
        for name in ("schemes.registry", "kernels.registry", "schemes.activations")
    )
    for entry in schemes.ENTRIES:
        formats = [fmt.name for fmt in entry.formats.values()]
        yield entry.name, "default", "none"
        for mode, having in kernels.SCALE_MODES.items():
            if mode != "default" and formats and set(formats) <= set(having):
                yield entry.name, mode, "none"
        offered = [
            {pair.format for pair in activations.pairs(activations.kernel_registry.FORMATS[name]) if not pair.static}
            for name in formats
        ]
        for activation in sorted(set.intersection(*offered) if offered else ()):
            yield entry.name, "default", activation


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


def measure_variants(folder: Path, text: str, schemes: Collection[str] = ()) -> list[Variant]:
    """The demo model as transformers loads it, then every variant, or those of some schemes with activations as are."""
    transformers = importlib.import_module("transformers")
    quantload = importlib.import_module("quantload")
    transformers.logging.disable_progress_bar()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    baseline = Compared(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())
    found = [_measured(baseline, ids, text, (BASELINE, "default", "none"), None)]
    for scheme, mode, activations in variants():
        if schemes and (scheme not in schemes or activations != "none"):
            continue
        model = quantload.load_quantized(
            str(folder),
            quantization=scheme,
            device="cpu",
            policy=quantload.QuantizationPolicy(scale_mode=mode),
            options=quantload.LoadOptions(activations=activations),
        )
        compared = Compared(model, iter(baseline.kept))
        found.append(_measured(compared, ids, text, (scheme, mode, activations), found[0]))
    return found


def _measured(
    compared: Compared, ids: Tensor, text: str, name: tuple[str, str, str], baseline: Variant | None
) -> Variant:
    start, model = time.perf_counter(), compared.model
    led = torch.cat([torch.tensor([model.config.eos_token_id]), ids])
    with torch.inference_mode():
        loss, tokens = importlib.import_module("train_demo").validation_loss(compared, led, WINDOW, STRIDE)
    report = getattr(model, "load_report", None)
    layers = report.layers if report is not None else []
    weights, perplexity = sum(layer.numel for layer in layers), math.exp(loss / tokens)
    print(f"{' '.join(name)}: {perplexity:.3f}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return Variant(
        scheme=name[0],
        scale_mode=name[1],
        activations=name[2],
        perplexity=perplexity,
        change=0.0 if baseline is None else perplexity / baseline.perplexity - 1,
        divergence=sum(compared.divergences) / max(len(compared.divergences), 1),
        bits_per_byte=loss / math.log(2) / len(text.encode()),
        bits_per_weight=8 * sum(layer.bytes_out for layer in layers) / weights if weights else None,
        final_bytes=_bytes(model),
        sqnr_db=_mean_sqnr(layers),
        quantized_modules=len(layers),
    )


def main() -> None:
    """Measure, print the tables, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "loader" / "demo_model", help="folder of the demo model")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "stdlib_validation.txt")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0, help="of the weights the SQNR is measured on")
    parser.add_argument("--only", choices=("perplexity", "sqnr"), help="the model's predictions, or the SQNR")
    parser.add_argument("--schemes", nargs="+", default=[], help="only these, with activations as they are")
    options = parser.parse_args()
    machine = describe_machine()
    print(headline(machine))
    result: dict[str, Any] = {"machine": machine, "seed": options.seed}
    if options.only != "sqnr":
        measured = measure_variants(options.model, options.text.read_text(), options.schemes)
        result["variants"] = [asdict(variant) for variant in measured]
        print_variants(result)
        print_best(result)
    if options.only != "perplexity":
        sqnrs = measure_sqnr(options.seed)
        result["sqnr"] = [{**asdict(row), "met": row.met} for row in sqnrs]
        print_sqnr(result)
    reduced = "part" if options.schemes else f"{options.only}-only" if options.only else ""
    print(f"\nwritten: {write_result('quality', result, options.results, reduced)}")


if __name__ == "__main__":
    main()
