"""What `quantload --fit` loses on the demo model, size by size, beside the best scheme for all modules that fits.

At each of twenty sizes, from that of the model in MXFP4 (4.25 bits a weight) to what it would have with 8.5 bits, the
divergence from BF16 is measured of what is chosen: by the table of sensitivities that comes with quantload, by those
that `--sensitivity` measures, by those of each module, and with `--fit-head`. They are measured on the first half of
the held-out text, the divergence on windows of 512 tokens of the second half.

    python bench/fit.py
    python bench/fit.py --sizes 3 --windows 2    # a quick look
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import quantload
import torch
from goals import Goal, at_most, print_goals
from machine import describe_machine, headline
from quality import ROOT, WINDOW, Compared
from quantload.fit.expected_loss import ERRORS
from quantload.fit.policy import fit_policy
from quantload.fit.sensitivity import measure_sensitivity
from result_files import RESULTS, write_result
from transformers import AutoTokenizer

BASELINE, BITS, MOST_BITS = "quark_mxfp4", 4.25, 8.5
GOAL_BITS = 4.5
GOALS = {"table": 0.40, "measured": 0.25, "each measured": 0.25, "table, head": 0.40, "each measured, head": 0.25}
"""Part of the baseline's divergence that is left at `GOAL_BITS`, by how sensitivities are known."""
OPTIONS = {"chunk_bytes": 1 << 18, "workers": 2}
"""Small pieces, so that the arena is the same whatever is chosen: this model is smaller than the usual one."""


@dataclass(frozen=True)
class Uniform:
    """The model in one scheme."""

    scheme: str
    final_bytes: int
    peak_bytes: int
    divergence: float


@dataclass(frozen=True)
class Fit:
    """What was chosen for the size that the model has with so many bits a weight, and the best one scheme there."""

    bits: float
    by: str
    final_bytes: int
    divergence: float
    best: str
    best_divergence: float


class Measured:
    """The demo model on some windows: divergences of policies from what it predicts as it is stored."""

    def __init__(self, folder: Path, inputs: Sequence[torch.Tensor]) -> None:
        self._folder, self._inputs = str(folder), inputs
        self._known: dict[Any, tuple[float, Any]] = {}
        self._stored = Compared(self._loaded(quantload.QuantizationPolicy("none")))
        self._run(self._stored)

    def divergence(self, policy: Any) -> tuple[float, Any]:
        """Of a policy in nats a token, and the report of its load."""
        if policy not in self._known:
            model = self._loaded(policy)
            compared = Compared(model, iter(self._stored.kept))
            self._run(compared)
            self._known[policy] = sum(compared.divergences) / len(compared.divergences), model.load_report
        return self._known[policy]

    def _loaded(self, policy: Any) -> Any:
        options = quantload.LoadOptions.from_mapping(OPTIONS)
        return quantload.load_quantized(self._folder, policy=policy, device="cpu", options=options, progress=False)

    @torch.inference_mode()
    def _run(self, compared: Compared) -> None:
        for each in self._inputs:
            compared(input_ids=each)


def uniform(measured: Measured) -> Iterator[Uniform]:
    """Every scheme for all modules."""
    for scheme in ERRORS:
        divergence, report = measured.divergence(quantload.QuantizationPolicy(scheme))
        yield Uniform(scheme, report.final_bytes, report.predicted_peak_bytes, divergence)


def fits(
    measured: Measured, folder: Path, schemes: Sequence[Uniform], sizes: int, by: Mapping[str, Any]
) -> Iterator[Fit]:
    """What is chosen at every size, for each way to know sensitivities."""
    (base,) = (each for each in schemes if each.scheme == BASELINE)
    report = measured.divergence(quantload.QuantizationPolicy(BASELINE))[1]
    weights = sum(layer.numel for layer in report.layers)
    steps = {BITS + (MOST_BITS - BITS) * step / (sizes - 1) for step in range(sizes)} | {GOAL_BITS}
    for bits in sorted(steps):
        size = base.peak_bytes + int((bits - BITS) / 8 * weights)
        best = min((each for each in schemes if each.peak_bytes <= size), key=lambda each: each.divergence)
        for name, options in by.items():
            given = quantload.LoadOptions.from_mapping({**OPTIONS, **options, "fit": size})
            chosen = fit_policy(str(folder), size, device="cpu", options=given)
            divergence, report = measured.divergence(chosen.policy)
            assert report.predicted_peak_bytes <= size
            yield Fit(bits, name, report.final_bytes, divergence, best.scheme, best.divergence)


def goals(schemes: Sequence[Uniform], found: Sequence[Fit]) -> Iterator[Goal]:
    """What is left of the baseline's divergence, and whether one scheme for all is ever better."""
    (base,) = (each for each in schemes if each.scheme == BASELINE)
    for name in dict.fromkeys(each.by for each in found):
        (at,) = (each for each in found if each.by == name and each.bits == GOAL_BITS)
        part = at.divergence / base.divergence
        yield at_most(f"divergence at {GOAL_BITS} bits", f"by {name}", part, GOALS[name], f" of {BASELINE}'s")
        worst = max(each.divergence / each.best_divergence for each in found if each.by == name)
        yield at_most("never more than one scheme's", f"by {name}", worst, 1.0, " of the best that fits")


def main() -> None:
    """Measure, print, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "loader" / "demo_model", help="folder of the demo model")
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "data" / "stdlib_validation.txt")
    parser.add_argument(
        "--windows", type=int, default=12, help="of 512 tokens, evenly over the second half of the text"
    )
    parser.add_argument("--sizes", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = describe_machine()
    print(headline(machine))
    text = options.text.read_text()
    first, second = text[: len(text) // 2], text[len(text) // 2 :]
    ids = AutoTokenizer.from_pretrained(options.model)(second, return_tensors="pt", verbose=False)["input_ids"][0]
    step = (len(ids) - WINDOW) // max(options.windows - 1, 1)
    measured = Measured(options.model, [ids[at : at + WINDOW][None] for at in range(0, step * options.windows, step)])
    schemes = list(uniform(measured))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "text.txt"
        path.write_text(first)
        sensitivities = {
            each: measure_sensitivity(str(options.model), path, each=each, device="cpu", progress=False)
            for each in (False, True)
        }
    by = {
        "table": {},
        "measured": {"fit_sensitivity": sensitivities[False]},
        "each measured": {"fit_sensitivity": sensitivities[True]},
        "table, head": {"fit_head": True},
        "each measured, head": {"fit_sensitivity": sensitivities[True], "fit_head": True},
    }
    found = []
    for each in fits(measured, options.model, schemes, options.sizes, by):
        found.append(each)
        part = each.divergence / each.best_divergence
        print(f"{each.bits:.3f} {each.by:19} {1000 * each.divergence:8.3f} {part:.3f} of {each.best}", flush=True)
    met = list(goals(schemes, found))
    print_goals(met)
    result = {
        "machine": machine,
        "windows": options.windows,
        "uniform": [asdict(each) for each in schemes],
        "sensitivity": {"measured": sensitivities[False], "each measured": sensitivities[True]},
        "fits": [asdict(each) for each in found],
        "goals": [asdict(each) for each in met],
    }
    reduced = "" if (options.sizes, options.windows) == (20, 12) else "part"
    print(f"\nwritten: {write_result('fit', result, options.results, reduced)}")


if __name__ == "__main__":
    main()
