"""`quantload eval`: divergences are exact, and what cannot be measured is refused before anything is loaded."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantload import LoadOptions, QuantizationPolicy, load_quantized
from quantload.checkpoint.resolve import resolve
from quantload.cli import DEMO_MODEL, app
from quantload.cli.evaluate import _below, _table
from quantload.errors import MemoryBudgetError, PolicyError, QuantloadError, UnsupportedCheckpointError
from quantload.fit import evaluating
from quantload.fit.evaluating import Evaluated, Evaluation, evaluate_schemes
from quantload.fit.kept_predictions import KeptPredictions
from quantload.fit.text_windows import text_windows
from rich.console import Console
from torch.nn import functional
from typer.testing import CliRunner

TEXT = Path(__file__).parent.parent / "data" / "stdlib_validation.txt"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT.read_text()[:1200])
    return path


@torch.inference_mode()
def logs_of(scheme: str, ids: torch.Tensor) -> torch.Tensor:
    model: Any = load_quantized(DEMO_MODEL, scheme, device="cpu", progress=False)
    logits: torch.Tensor = model(input_ids=ids).logits[0]
    return logits.float().log_softmax(-1)


def test_perplexity_and_divergence_are_those_of_all_predictions(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "AT_ONCE", 37)
    options = LoadOptions(fit="1GiB")
    found = evaluate_schemes(DEMO_MODEL, text, ["nl4", "none"], device="cpu", options=options, progress=False)
    assert (found.reference.name, found.windows) == ("none", 1)
    assert [each.name for each in found.schemes] == ["nl4", "none", "fit 1.000 GiB"]
    nl4, same, fitted = found.schemes
    (ids,) = text_windows(resolve(DEMO_MODEL), text.read_text(), False, "a test", 512, 8)
    assert ids.shape[1] == found.tokens
    base, other = logs_of("none", ids), logs_of("nl4", ids)
    each = functional.kl_div(other, base, reduction="none", log_target=True).sum(-1)
    assert nl4.divergence == pytest.approx(float(each.mean()), rel=1e-3)
    assert nl4.divergence_error == pytest.approx(float(each.std(correction=0)) / math.sqrt(len(each)), rel=1e-2)
    assert nl4.same_token == float((base.argmax(-1) == other.argmax(-1)).double().mean())
    for one, logs in ((found.reference, base), (nl4, other)):
        assert one.perplexity == pytest.approx(math.exp(functional.nll_loss(logs[:-1], ids[0, 1:])), rel=1e-5)
    for one in (same, fitted):
        assert (one.perplexity, one.same_token) == (found.reference.perplexity, 1.0)
        assert one.divergence == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_the_command_measures_schemes_and_policies(text: Path, tmp_path: Path) -> None:
    policy = tmp_path / "some.json"
    policy.write_text(json.dumps({"linear": "nl4", "experts": "none"}))
    arguments = ["eval", "--text", str(text), "--tokens", "64", "-q", "NL4,  none", "--policy", str(policy), "--json"]
    told = json.loads(CliRunner().invoke(app, [*arguments, "--reference", "nl4", "--device", "cpu"]).stdout)
    assert told["reference"]["name"] == "nl4"
    assert [each["name"] for each in told["schemes"]] == ["nl4", "none", "some.json"]
    assert told["schemes"][0]["divergence"] < told["schemes"][2]["divergence"] < told["schemes"][1]["divergence"]


def test_the_table_has_what_was_measured() -> None:
    reference = Evaluated("none", 4 << 20, 6 << 20, 10.0, 0.0, 0.0, 1.0, 1.0)
    other = Evaluated("nl4", 1 << 20, 3 << 20, 11.0, 0.0125, 0.0005, 0.95, 2.5)
    found = Evaluation("model", 4096, 8, reference, (other,))
    with (console := Console(width=200)).capture() as shown:
        console.print(_table(found))
    rows = [line.split() for line in shown.get().splitlines() if "MiB" in line]
    assert rows[0] == ["none", "4.000", "MiB", "6.000", "MiB", "10.000", "-", "-", "-", "1.0"]
    assert rows[1][5:] == ["11.000", "+10.00%", "0.01250", "+-", "0.00050", "95.00%", "2.5"]
    assert "4,096 tokens in 8 parts; divergence from none in nats a token" in _below(found)[0]


def test_predictions_are_read_as_often_as_is_wanted() -> None:
    logs = torch.randn(7, 11).log_softmax(-1)
    logs[3] = torch.tensor([0.0] + [-torch.inf] * 10)
    with KeptPredictions.of(7) as kept:
        kept.expect(11)
        kept.write(logs[:2])
        kept.write(logs[2:])
        for parts in (7, 3):
            kept.rewind()
            read = torch.cat([kept.read(part) for part in logs.split(parts)])
            assert torch.allclose(read.exp(), logs.exp(), atol=1e-3)
        kept.rewind()
        with pytest.raises(PolicyError, match="one predicts 12 words and the reference 11"):
            kept.read(torch.zeros(7, 12))


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with KeptPredictions.of(7) as kept, pytest.raises(QuantloadError, match=r"7 tokens take 1.094 KiB .* set TMPDIR"):
        kept.expect(80)


def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    text: Path, tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(evaluating, "load_quantized", load)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    odd = {"odd": QuantizationPolicy("nl4", scale_mode="mse")}
    wrong: tuple[tuple[type[QuantloadError], str, dict[str, Any]], ...] = (
        (PolicyError, "unknown scheme", {"schemes": ["nl4", "nl5"]}),
        (PolicyError, "mse", {"policies": odd}),
        (PolicyError, "tokens; eval needs 64", {"text": short}),
        (PolicyError, "tokens is 63; eval needs 64", {"tokens": 63}),
        (PolicyError, "cannot be read", {"text": tmp_path / "none.txt"}),
        (MemoryBudgetError, "the limit is 1.000 MiB", {"options": LoadOptions(max_memory="1MiB")}),
        (UnsupportedCheckpointError, "eval is measured on texts that go on", {"model_id": checkpoint("bert")}),
    )
    for kind, message, arguments in wrong:
        with pytest.raises(kind, match=message):
            evaluate_schemes(**{"model_id": DEMO_MODEL, "text": text, "device": "cpu", **arguments})
