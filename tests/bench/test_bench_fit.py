"""`bench/fit.py` and `bench/encoder.py`: what counts as met, and what is done without the encoder."""

from __future__ import annotations

import sys
from pathlib import Path

import encoder
import fit
import pytest
import torch


def test_fit_is_held_to_the_best_one_scheme_at_every_size() -> None:
    schemes = [fit.Uniform("quark_mxfp4", 4, 8, 0.020), fit.Uniform("nl4", 5, 9, 0.009)]
    found = [fit.Fit(4.5, "table", 5, 0.006, "nl4", 0.009), fit.Fit(5.0, "table", 6, 0.0095, "nl4", 0.009)]
    part, never = fit.goals(schemes, found)
    assert (part.met, part.reached) == (True, "0.30 of quark_mxfp4's")
    assert (never.met, never.reached) == (False, "1.06 of the best that fits, 5.6% over")


def test_embeddings_are_means_of_the_tokens_that_are_there() -> None:
    hidden = torch.tensor([[[3.0, 0.0], [1.0, 8.0], [9.0, 9.0]]], dtype=torch.float64)
    found = encoder.pooled(hidden, torch.tensor([[1, 1, 0]]))
    assert torch.allclose(found, torch.tensor([[1.0, 2.0]], dtype=torch.float64) / 5**0.5)


def test_an_encoder_is_held_to_schemes_that_are_no_larger() -> None:
    rows = [encoder.Row(name, size, far, size, fitted, ()) for name, size, far, fitted in
            (("a", 1, 4.0, 4.0), ("b", 2, 6.0, 3.0), ("c", 3, 0.0, 0.0))]  # fmt: skip
    assert [goal.met for goal in encoder.goals(rows)] == [True, True]
    rows[1] = encoder.Row("b", 2, 6.0, 2, 5.0, ())
    assert [goal.met for goal in encoder.goals(rows)] == [True, False]


def test_the_encoder_is_skipped_where_its_package_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package")
    assert encoder.model_folder() is None
    monkeypatch.setattr(encoder, "model_folder", lambda: None)
    monkeypatch.setattr(sys, "argv", ["encoder.py", "--results", str(tmp_path)])
    encoder.main()
    assert "skipped: the package no-such-package is not installed" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]
