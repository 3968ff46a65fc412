"""What `--fit` chooses stays below the size it was given, measured from outside of the process that loads."""

from __future__ import annotations

from pathlib import Path

import big_checkpoints
import pytest
from quantload import LoadOptions, plan_quantized
from quantload.fit.expected_loss import ERRORS, ladder
from quantload.fit.policy import fit_policy
from test_memory_bound import measure

SIZES = 5
OPTIONS = {"workers": 2, "staging_bytes": 16 << 20}


@pytest.mark.slow
def test_the_measured_peak_stays_below_the_size(tmp_path: Path) -> None:
    """Of a dense model in BF16, at sizes from the smallest that fits to one that leaves it as it is stored."""
    path = big_checkpoints.llama(
        tmp_path / "dense", hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, vocab_size=4096
    )
    options = LoadOptions.from_mapping(OPTIONS)
    low, high = (
        plan_quantized(path, name, device="cpu", options=options).plan.memory.peak_bytes
        for name in (ladder(ERRORS)[0], "none")
    )
    finals = []
    for step in range(SIZES):
        size = low + (high - low) * step // (SIZES - 1)
        fitted = fit_policy(path, size, device="cpu", options=options)
        measured = measure(path, "auto", {**OPTIONS, "fit": size})
        assert measured.peak <= size
        assert measured.report["final_bytes"] == fitted.final_bytes
        finals.append(fitted.final_bytes)
    assert finals == sorted(set(finals))
