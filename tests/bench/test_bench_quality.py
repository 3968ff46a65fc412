"""`bench/quality.py`: what it measures, how predictions are compared, and which variant it calls the best."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import quality
import quality_sqnr
import quality_tables
import torch
from quality_tables import BASELINE, Variant, best_of_each_size
from quantload.schemes.registry import ENTRIES

PLAIN = Variant("a", "default", "none", 20.0, 0.01, 0.002, 1.2, 4.25, 5_000_000, 19.0, 35)


def test_every_registered_scheme_is_measured_with_all_it_offers() -> None:
    found = list(quality.variants())
    assert len(found) == len(set(found))
    assert {scheme for scheme, mode, activations in found if (mode, activations) == ("default", "none")} == {
        entry.name for entry in ENTRIES
    }
    assert ("quark_mxfp4", "mse", "none") in found
    assert ("quark_mxfp4", "default", "mxfp6_e3m2") in found
    assert ("int8_per_channel", "default", "int8") in found
    assert not [each for each in found if each[0] == "int8_per_channel" and each[1] == "mse"]
    assert not [each for each in found if each[0] == "none" and each[2] != "none"]


def test_predictions_are_compared_window_by_window() -> None:
    class Model:
        def __init__(self, logits: list[torch.Tensor]) -> None:
            self.logits = iter(logits)

        def __call__(self, **_: Any) -> Any:
            return type("Output", (), {"logits": next(self.logits)[None]})

    first, second = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 2.0]])
    baseline = quality.Compared(Model([first, second]))
    baseline(), baseline()
    changed = [torch.tensor([[0.0, 0.0], [3.0, 3.0]]), torch.tensor([[0.2, 0.8]]).log()]
    other = quality.Compared(Model(changed), iter(baseline.kept))
    other(), other()
    # KL of (1/2, 1/2) from (1/5, 4/5) is log(5/2)/2 + log(5/8)/2
    assert other.divergences == pytest.approx([0.0, 0.0, 0.22314], abs=1e-3)


def test_the_best_of_each_size_has_the_least_divergence_of_what_compares() -> None:
    variants = [
        replace(PLAIN, scheme=BASELINE, bits_per_weight=None, quantized_modules=0),
        PLAIN,
        replace(PLAIN, scheme="better", bits_per_weight=4.5, divergence=0.001),
        replace(PLAIN, scheme="rounded", divergence=0.0, activations="mxfp4"),
        replace(PLAIN, scheme="partial", divergence=0.0, quantized_modules=7),
        replace(PLAIN, scheme="eight", bits_per_weight=8.25, divergence=0.0001, scale_mode="mse"),
    ]
    found = best_of_each_size(variants)
    assert [(bits, [each.scheme for each in ranked]) for bits, ranked in found] == [
        (4, ["better", "a"]),
        (8, ["eight"]),
    ]
    text = quality_tables.render_best({"variants": [asdict(each) for each in variants]})
    assert "| 4 | better | 4.50 | 1.000 | +1.00% | a 2.000 |" in text
    assert "| 8 | eight, mse scales | 8.25 | 0.100 | +1.00% | - |" in text


def test_variants_are_named_by_what_is_not_as_usual() -> None:
    assert PLAIN.name == "a"
    assert replace(PLAIN, scale_mode="mse", activations="fp8").name == "a, mse scales, fp8 activations"


def test_the_sqnr_table_says_what_the_least_error_adds() -> None:
    rows = [
        {"format": name, "scale_mode": mode, "distribution": "gauss", "bits_per_weight": 4.25, "db": db}
        for name, mode, db in (("x", "default", 19.0), ("x", "mse", 19.05), ("y", "default", 31.0))
    ]
    text = quality_tables.render_sqnr({"sqnr": rows})
    assert "| x | 4.25 | 19.00 | +0.05 |" in text
    assert "| y | 4.25 | 31.00 |  |" in text


def test_sqnr_of_a_small_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_sqnr, "ROWS", 64)
    monkeypatch.setattr(quality_sqnr, "COLUMNS", 256)
    monkeypatch.setattr(quality_sqnr, "MEASURED", ("mxfp4", "nvfp4", "fp8_channel", "fp8_channel_fnuz"))
    monkeypatch.setattr(quality_sqnr, "DISTRIBUTIONS", {"gauss": quality_sqnr.DISTRIBUTIONS["gauss"]})
    found = quality_sqnr.measure_sqnr(0)
    assert [(row.format, row.scale_mode) for row in found] == [
        ("mxfp4", "default"), ("mxfp4", "mse"), ("nvfp4", "default"), ("nvfp4", "mse"), ("fp8_channel", "default"),
    ]  # fmt: skip
    of_tensor = 32 / (64 * 256)
    assert [row.bits_per_weight for row in found] == [4.25, 4.25, 4.5 + of_tensor, 4.5 + of_tensor, 8.125]
    assert found[0].db == pytest.approx(19.0, abs=0.3)
    assert found[1].db > found[0].db
    assert all(row.db == pytest.approx(row.kernel_db, abs=0.01) for row in found)
