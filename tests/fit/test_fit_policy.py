"""`--fit`: schemes whose load stays below a size and that are expected to lose the least."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quantload
import torch
from quantload import QuantizationPolicy, load, load_quantized, plan_quantized
from quantload.checkpoint.resolve import resolve
from quantload.cli import app
from quantload.draft import FROM_CONFIG
from quantload.errors import MemoryBudgetError, PolicyError
from quantload.fit import room
from quantload.fit.expected_loss import ERRORS, grouped, items_of, ladder
from quantload.fit.peaks import scheme_peaks
from quantload.fit.policy import fit_policy
from quantload.memory.amounts import parse_bytes
from quantload.memory.limits import MACHINE, MemoryLimit
from quantload.memory.report import LoadReport
from quantload.options import LoadOptions
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

DEMO_MODEL = Path(quantload.__file__).parent / "demo_model"
SCHEMES = ladder(ERRORS)


@pytest.fixture(scope="module")
def peaks() -> Mapping[str, int]:
    """Of the demo model in each scheme whose expected loss is known."""
    draft = plan_quantized(DEMO_MODEL, "quark_mxfp4", device="cpu")
    others = {each.scheme: each.peak_bytes for each in scheme_peaks(draft, LoadOptions()) if each.scheme in ERRORS}
    exact = {name: plan_quantized(DEMO_MODEL, name, device="cpu").plan.memory.peak_bytes for name in SCHEMES}
    return {"quark_mxfp4": draft.plan.memory.peak_bytes, **others, **exact}


def expected_loss(policy: QuantizationPolicy) -> float:
    """By the schemes that modules get."""
    chosen, total = dict(policy.overrides), 0.0
    for item in items_of(plan_quantized(DEMO_MODEL, SCHEMES[0], device="cpu")):
        (scheme,) = {chosen.get(name, policy.linear) for name in item.names}
        total += item.loss * ERRORS[scheme]
    return total


@pytest.mark.parametrize("sizes", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_sizes_are_kept_to_lose_less_and_less_and_no_more_than_one_scheme_would(
    sizes: int, peaks: Mapping[str, int]
) -> None:
    low, high = min(peaks.values()), peaks["none"]
    before = total = expected_loss(QuantizationPolicy(SCHEMES[0])) / ERRORS[SCHEMES[0]]
    for step in range(sizes):
        size = low + (high - low) * step // (sizes - 1)
        fitted = fit_policy(DEMO_MODEL, size, device="cpu")
        assert fitted.planned_bytes <= size
        planned = plan_quantized(DEMO_MODEL, policy=fitted.policy, device="cpu").plan.memory
        assert planned.peak_bytes == fitted.planned_bytes
        loss = expected_loss(fitted.policy)
        assert loss == pytest.approx(fitted.expected_loss)
        assert loss <= before + 1e-9
        for name, peak in peaks.items():
            assert peak > size or loss <= total * ERRORS[name] + 1e-9, (step, name)
        before = loss
    assert before == 0.0


def test_everything_stays_as_stored_where_it_fits(peaks: Mapping[str, int]) -> None:
    fitted = fit_policy(DEMO_MODEL, peaks["none"] + (1 << 20), device="cpu")
    assert fitted.policy == QuantizationPolicy(linear="none")
    assert {row.scheme for row in fitted.rows} == {"none"}
    assert [*fitted.lines()][-1] == "Fit: all modules stay as they are stored"
    assert [row.share_of_loss for row in fitted.rows] == [0.0] * len(fitted.rows)


def test_what_cannot_fit_is_refused_with_both_numbers() -> None:
    small = r"nothing fits: .* in int4_per_group, .*MiB \(model .* MiB\), and fit is 64.000 MiB: give --fit \d+MiB$"
    with pytest.raises(MemoryBudgetError, match=small):
        fit_policy(DEMO_MODEL, "64MiB", device="cpu")
    with pytest.raises(MemoryBudgetError) as caught:
        fit_policy(DEMO_MODEL, "72MiB", device="cpu")
    advised = re.search(r"smaller: --staging (\d+MiB) instead of 4.000 MiB; or give --fit (\d+MiB)$", str(caught.value))
    assert advised is not None
    assert fit_policy(DEMO_MODEL, advised[2], device="cpu").planned_bytes <= parse_bytes(advised[2])
    fit_policy(DEMO_MODEL, "72MiB", device="cpu", options=LoadOptions.from_mapping({"staging_bytes": advised[1]}))
    with pytest.raises(PolicyError, match="fit chooses the schemes"):
        fit_policy(DEMO_MODEL, "1GiB", policy=QuantizationPolicy(experts="mxfp8"), device="cpu")


def test_a_model_is_loaded_as_fitted_twice_the_same(peaks: Mapping[str, int], caplog: pytest.LogCaptureFixture) -> None:
    given = QuantizationPolicy(
        ignore=("*.layers.0.*.o_proj",), overrides=(("*.layers.3.*.o_proj", "mxfp8"), ("*.layers.3.*.o_proj", "nl4"))
    )
    size = (peaks[SCHEMES[0]] + peaks["none"]) // 2
    caplog.set_level(logging.INFO, "quantload")
    caplog.clear()
    fitted = fit_policy(DEMO_MODEL, size, policy=given, device="cpu")
    assert not [record for record in caplog.records if "changes nothing" in record.message]
    assert fitted == fit_policy(DEMO_MODEL, size, policy=given, device="cpu")
    assert fitted.policy.overrides[0] == ("*.layers.3.*.o_proj", "mxfp8")
    report = load_quantized(DEMO_MODEL, policy=fitted.policy, device="cpu", progress=False).load_report
    assert len([record for record in caplog.records if "another --override comes first" in record.message]) == 1
    schemes = {layer["name"]: layer["scheme"] for layer in report.to_dict()["layers"]}
    assert report.final_bytes == fitted.final_bytes
    assert report.peak_bytes <= report.predicted_peak_bytes == fitted.planned_bytes <= size
    assert schemes["model.layers.3.self_attn.o_proj"] == "mxfp8"
    assert "model.layers.0.self_attn.o_proj" not in schemes
    for layer in range(7):
        assert len({schemes.get(f"model.layers.{layer}.self_attn.{name}_proj") for name in "qkv"}) == 1


def test_a_load_chooses_for_itself_and_its_report_says_what(peaks: Mapping[str, int]) -> None:
    size = peaks["mxfp6_e2m3"]
    chosen = fit_policy(DEMO_MODEL, size, device="cpu")
    model = load_quantized(DEMO_MODEL, fit=f"{size}B", device="cpu", progress=False)
    report = model.load_report
    assert report.fit == chosen.report()
    assert report.predicted_peak_bytes == chosen.planned_bytes
    assert sum(row.bytes for row in chosen.rows) == sum(layer.bytes_out for layer in report.layers)
    assert QuantizationPolicy.from_mapping(chosen.to_dict()["policy"]) == chosen.policy
    assert LoadReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert model.load_settings.options.fit is None
    with pytest.raises(PolicyError, match="not a load report"):
        LoadReport.from_dict(report.to_dict() | {"fit": {"size": 1}})
    with pytest.raises(PolicyError, match="fit chooses the schemes: leave out the quantization"):
        load_quantized(DEMO_MODEL, "nl4", fit=size, progress=False)
    with pytest.raises(PolicyError, match=r"fit: '16' has no unit"):
        load_quantized(DEMO_MODEL, fit="16", progress=False)


def test_who_has_a_model_already_or_only_a_part_of_one_is_told_to_plan_alone() -> None:
    config = quantload.QuantloadConfig("auto", options={"fit": "1GiB"})
    with pytest.raises(PolicyError, match="fit is for load_quantized: plan with it"):
        AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=config)
    ranks: Any = SimpleNamespace(ranks=2)
    options, place = LoadOptions(fit="auto"), torch.device("cpu")
    with pytest.raises(PolicyError, match="fit is for one process: plan with it alone"):
        load._with_schemes_that_fit(
            *(FROM_CONFIG, resolve(DEMO_MODEL), "auto", None, options, place, False, ranks, None)
        )


def test_a_load_without_weights_chooses_too(tmp_path: Path, peaks: Mapping[str, int]) -> None:
    (tmp_path / "config.json").write_text((DEMO_MODEL / "config.json").read_text())
    options = LoadOptions(fit=peaks["int8_per_channel"])
    report = load_quantized(tmp_path, weights="dummy", options=options, device="cpu", progress=False).load_report
    assert report.fit is not None
    assert report.predicted_peak_bytes <= peaks["int8_per_channel"]


def test_auto_is_what_is_free_less_a_reserve_and_the_attention_cache(
    peaks: Mapping[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(nbytes: int) -> None:
        wide = MemoryLimit("a wider limit", 1 << 40, 0, is_virtual=True)
        monkeypatch.setattr(room, "memory_limits", lambda: [wide, MemoryLimit(MACHINE, nbytes, 0, False)])

    config = json.loads((DEMO_MODEL / "config.json").read_text())
    a_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2
    available = (peaks["mxfp6_e2m3"] + 300 * a_token) * 20 // 19 + 20
    free(available)
    options = LoadOptions(fit="auto", fit_context=100, fit_requests=3)
    fitted = fit_policy(DEMO_MODEL, "auto", device="cpu", options=options)
    left = fitted.room
    assert (left.available_bytes, left.reserve_bytes, left.cache_bytes) == (available, available // 20, 300 * a_token)
    assert peaks["mxfp6_e2m3"] <= left.size == available - available // 20 - 300 * a_token
    assert fitted.policy == fit_policy(DEMO_MODEL, left.size, device="cpu").policy
    assert "are free (the machine), less " in str(left)
    assert "for an attention cache of 3 x 100 tokens" in next(fitted.lines())
    context = min(config["max_position_embeddings"], room.MOST_CONTEXT)
    draft = plan_quantized(DEMO_MODEL, "nl4", device="cpu")
    assert room.free_room(draft, LoadOptions(fit="auto")).context == context
    free(300 * a_token)
    with pytest.raises(MemoryBudgetError, match="fit is auto, and nothing is left for the model"):
        room.free_room(draft, options)
    free(64 << 20)
    with pytest.raises(MemoryBudgetError, match=r"nothing fits: .*are free \(the machine\), less"):
        fit_policy(DEMO_MODEL, "auto", device="cpu", options=options)


def test_a_policy_comes_back_from_its_file(tmp_path: Path) -> None:
    policy = QuantizationPolicy("nl4", "mxfp8", ("a.*",), (("re:b.*c", "none"),), scale_mode="default")
    (tmp_path / "policy.json").write_text(json.dumps(asdict(policy)))
    (tmp_path / "policy.toml").write_text(
        'linear = "nl4"\nexperts = "mxfp8"\nignore = ["a.*"]\n[overrides]\n"re:b.*c" = "none"\n'
    )
    for name in ("policy.json", "policy.toml"):
        assert QuantizationPolicy.from_file(tmp_path / name) == policy
    for text in ("[1]", "{", '{"experts": "nosuch"}', '{"expert": "nl4"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises((PolicyError, quantload.QuantloadError)):
            QuantizationPolicy.from_file(tmp_path / "bad.json")
    with pytest.raises(PolicyError, match="is no policy"):
        QuantizationPolicy.from_file(tmp_path / "missing.json")


def test_the_command_plans_saves_and_takes_what_was_saved(tmp_path: Path, peaks: Mapping[str, int]) -> None:
    size, saved = peaks["mxfp6_e2m3"], tmp_path / "fit.json"
    arguments = ["plan", "--device", "cpu", "--json"]
    fitted = CliRunner().invoke(app, [*arguments, "--fit", f"{size}B", "--save-policy", str(saved)])
    assert fitted.exit_code == 0, fitted.output
    told = json.loads(fitted.stdout)
    assert told["fit"]["planned_bytes"] == told["peak_bytes"] <= size == told["fit"]["size"]
    assert abs(sum(row["share_of_loss"] for row in told["fit"]["rows"]) - 1) < 1e-9
    again = json.loads(CliRunner().invoke(app, [*arguments, "--policy", str(saved)]).stdout)
    assert again["fit"] is None
    assert again["modules"] == told["modules"]
    for wrong in (["--fit", "1GiB", "-q", "nl4"], ["--policy", str(saved), "--experts", "nl4"]):
        assert CliRunner().invoke(app, [*arguments, *wrong]).exit_code != 0


SMALL_PIECES = {"chunk_bytes": 1 << 18, "workers": 2}
"""So that the arena is the same whatever is chosen: the demo model is smaller than the usual one."""


def test_the_head_and_the_embedding_are_chosen_for_where_that_is_asked_for() -> None:
    """They are tied: quantized they are two weights, in one scheme, as two BF16 ones would take more."""
    options = LoadOptions.from_mapping(SMALL_PIECES)
    stored, small = (
        plan_quantized(DEMO_MODEL, each, device="cpu", options=options).plan.memory for each in ("none", "nl4")
    )
    names = ("lm_head", "model.embed_tokens")
    size = small.peak_bytes + (80 << 10)
    given = LoadOptions.from_mapping({**SMALL_PIECES, "fit": size, "fit_head": True})
    fitted = fit_policy(DEMO_MODEL, size, device="cpu", options=given)
    assert fitted.expected_loss < fit_policy(DEMO_MODEL, size, device="cpu", options=options).expected_loss
    schemes = dict(fitted.policy.overrides)
    assert schemes[names[0]] == schemes[names[1]] not in ("none", "nl4")
    assert [(row.third, row.modules) for row in fitted.rows if row.kind == "head and embedding"] == [("", 2)]
    report = load_quantized(DEMO_MODEL, options=given, device="cpu", progress=False).load_report
    assert report.final_bytes == fitted.final_bytes
    assert report.predicted_peak_bytes == fitted.planned_bytes <= size
    assert set(names) <= {layer.name for layer in report.layers}
    whole = fit_policy(DEMO_MODEL, stored.peak_bytes, device="cpu", options=given)
    assert (whole.policy, whole.final_bytes) == (QuantizationPolicy("none"), stored.final_bytes)
    for policy in (
        QuantizationPolicy(ignore=("lm_*",)),
        QuantizationPolicy(overrides=(("model.embed_tokens", "mxfp8"),)),
    ):
        alone = fit_policy(DEMO_MODEL, 1 << 30, policy=policy, device="cpu", options=given)
        assert not [row for row in alone.rows if not row.third]


@pytest.mark.parametrize(("name", "kinds"), [("llama", {"head", "embedding"}), ("bert", set())])
def test_those_of_other_models_are_chosen_for_one_by_one_or_stay(
    name: str, kinds: set[str], checkpoint: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "quantload")
    options = LoadOptions(fit=1 << 40, fit_head=True)
    for default_ignore in (True, False):
        policy = QuantizationPolicy(default_ignore=default_ignore)
        whole = fit_policy(checkpoint(name), 1 << 40, policy=policy, device="cpu", options=options)
        assert {row.kind for row in whole.rows if not row.third} == kinds
        assert {scheme for _, scheme in whole.policy.overrides} == (set() if default_ignore or not kinds else {"none"})
    low = plan_quantized(checkpoint(name), "nl4", device="cpu").plan.memory.peak_bytes
    fitted = fit_policy(checkpoint(name), low, device="cpu", options=options)
    planned = plan_quantized(checkpoint(name), policy=fitted.policy, device="cpu").plan.memory
    assert (planned.final_bytes, planned.peak_bytes) == (fitted.final_bytes, fitted.planned_bytes)
    assert ("stay as they are stored" in caplog.text) == (not kinds)


def test_a_head_is_chosen_for_in_loads_only(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="fit_head says what fit is to choose for: give a size, too"):
        LoadOptions(fit_head=True)
    with pytest.raises(PolicyError, match="fit_head is for loads"):
        quantload.convert_checkpoint(DEMO_MODEL, tmp_path / "out", options=LoadOptions(fit=1 << 30, fit_head=True))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "qkv"),
        ("bert.encoder.layer.0.attention.self.value", "qkv"),
        ("bert.encoder.layer.0.attention.output.dense", "o"),
        ("bert.encoder.layer.0.intermediate.dense", "gate_up"),
        ("bert.encoder.layer.0.output.dense", "down"),
        ("pooler.dense", "other"),
    ],
)
def test_kinds_are_told_by_the_ends_of_names(name: str, kind: str) -> None:
    (item,) = grouped([name], ())
    assert item.kind == kind
