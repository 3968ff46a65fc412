"""What was asked for and changes nothing is said, with the reason, and is an error in strict mode."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantload import LoadOptions, QuantizationPolicy, cli, convert_checkpoint, load_quantized
from quantload.errors import UnappliedOptionError, UnmatchedPatternError
from quantload.planning import plan_quantized

Checkpoint = Callable[[str], Path]
GOLDEN = Path(__file__).parent.parent / "data" / "golden"
Q = "model.layers.0.self_attn.q_proj"
TIED = "its weight is tied to another parameter"


def said(
    path: Path, quantization: str = "quark_mxfp4", kernels: Any = (), activations: Any = "auto", **policy: Any
) -> list[str]:
    """What a plan says of options that change nothing."""
    options = LoadOptions(kernels=dict(kernels), activations=activations)
    draft = plan_quantized(path, quantization, policy=QuantizationPolicy(**policy), options=options, device="cpu")
    return [str(each) for each in draft.unapplied]


@pytest.mark.parametrize(
    ("name", "quantization", "policy", "expected"),
    [
        ("llama", "experts_int8", {},
         "--quantization experts_int8 changes nothing: the model has no experts modules; linear layers: experts_int8 "
         "leaves linear layers as stored (14); linear layers: output head (1)"),
        ("llama", "quark_mxfp4", {"experts": "int8"},
         "--experts int8 changes nothing: the model has no experts modules"),
        ("llama", "quark_mxfp4", {"ignore": ("*",)},
         "--quantization quark_mxfp4 changes nothing: the model has no experts modules; ignored by pattern '*'"),
        ("llama_tied", "quark_mxfp4", {"overrides": {"lm_*": "mxfp8"}},
         f"--override lm_*=mxfp8 changes nothing: {TIED} (lm_head)"),
        ("llama_tied", "quark_mxfp4", {"default_ignore": False},
         f"--no-default-ignore changes nothing: {TIED} (lm_head)"),
        ("llama", "quark_mxfp4", {"overrides": {"*.q_proj": "experts_int8"}},
         "--override *.q_proj=experts_int8 changes nothing: experts_int8 leaves linear layers as stored "
         "(model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj)"),
        ("llama", "quark_mxfp4", {"overrides": [("*_proj", "mxfp8"), (Q, "none")]},
         f"--override {Q}=none changes nothing: another --override comes first ({Q})"),
        ("llama", "quark_mxfp4", {"overrides": [(Q, "mxfp8"), (Q, "none")]},
         f"--override {Q}=none changes nothing: another --override comes first ({Q})"),
        ("llama", "quark_mxfp4", {"overrides": {"*_proj": "mxfp8"}, "ignore": (Q,)},
         f"--ignore {Q} changes nothing: an --override counts more ({Q})"),
        ("llama", "quark_mxfp4", {"ignore": ("model.embed_tokens",)},
         "--ignore model.embed_tokens changes nothing: it fits no linear or experts module, only a module of "
         "Embedding; it must fit the whole name (model.embed_tokens)"),
        ("llama", "quark_mxfp4", {"overrides": {"layers.*": "mxfp8"}},
         "--override layers.*=mxfp8 changes nothing: it fits no module"),
    ],
)  # fmt: skip
def test_schemes_and_patterns_that_change_nothing(
    checkpoint: Checkpoint, name: str, quantization: str, policy: dict[str, Any], expected: str
) -> None:
    assert said(checkpoint(name), quantization, **policy) == [expected]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"activations": "fp8"}, "--activations fp8 changes nothing: no module is quantized"),
        ({"scale_mode": "mse"}, "--scale-mode mse changes nothing: no module is quantized by this load"),
        ({"kernels": {"linear": "torch"}}, "--kernel linear=torch changes nothing: no linear layers are quantized"),
        ({"kernels": {"quantize": "torch"}},
         "--kernel quantize=torch changes nothing: no module is quantized by this load"),
    ],
)  # fmt: skip
def test_options_that_change_nothing_where_nothing_is_quantized(
    checkpoint: Checkpoint, options: dict[str, Any], expected: str
) -> None:
    assert said(checkpoint("llama"), "none", **options) == [expected]


@pytest.mark.parametrize("options", [{"kernels": {"quantize": "torch"}}, {"scale_mode": "mse"}])
def test_what_is_for_quantizing_changes_nothing_where_codes_stay_as_they_are_stored(options: dict[str, Any]) -> None:
    (line,) = said(GOLDEN / "quark_llama_mxfp4", "auto", **options)
    assert line.endswith("changes nothing: no module is quantized by this load")


@pytest.mark.parametrize(
    ("name", "quantization", "options"),
    [
        ("llama", "none", {}),
        ("llama", "none", {"activations": "none"}),
        ("llama", "quark_int4fp8_moe", {}),
        ("qwen3_moe", "experts_int8", {"kernels": {"experts": "torch"}}),
        ("qwen3_moe", "none", {"experts": "int8"}),
        ("llama_tied", "quark_mxfp4", {"overrides": {"lm_head": "none"}}),
        ("llama_tied", "quark_mxfp4", {"overrides": {"re:lm_head|.*q_proj": "mxfp8"}}),
        ("llama", "quark_mxfp4", {"overrides": {"*": "mxfp8"}, "default_ignore": False}),
        ("llama", "quark_mxfp4", {"overrides": {"*": "mxfp6_e3m2"}, "activations": "mxfp6_e3m2"}),
        ("llama_odd", "int4_per_group", {"overrides": {"*.o_proj": "int4_per_group"}}),
    ],
)
def test_nothing_is_said_of_what_was_done(
    checkpoint: Checkpoint, name: str, quantization: str, options: dict[str, Any]
) -> None:
    assert said(checkpoint(name), quantization, **options) == []


def test_as_it_is_stored_is_what_a_quantized_checkpoint_was_asked_for() -> None:
    assert said(GOLDEN / "quark_llama_mxfp4", "auto") == []
    assert said(GOLDEN / "quark_llama_mxfp4", "mxfp4") == []
    assert said(GOLDEN / "quark_llama_mxfp4", "mxfp8") == []


def test_a_load_warns_and_is_an_error_in_strict_mode(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    path, policy = checkpoint("llama_tied"), QuantizationPolicy(overrides={"lm_*": "mxfp8"}, ignore=("nothing",))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "quantload"):
        load_quantized(path, policy=policy)
    assert [each.message for each in caplog.records if "nothing" in each.message] == [
        "patterns that match no linear or experts module: 'nothing'; module names look like "
        "'model.layers.0.self_attn.q_proj', and a regular expression begins with 're:'",
        f"--override lm_*=mxfp8 changes nothing: {TIED} (lm_head)",
    ]
    strict = LoadOptions(strict=True)
    with pytest.raises(UnmatchedPatternError):
        load_quantized(path, policy=policy, options=strict)
    with pytest.raises(UnappliedOptionError, match=rf"--override lm_\*=mxfp8 changes nothing: {TIED}"):
        load_quantized(path, policy=QuantizationPolicy(overrides=(("lm_*", "mxfp8"),)), options=strict)


def test_a_conversion_computes_nothing(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = LoadOptions(kernels={"linear": "torch", "quantize": "torch"})
    convert_checkpoint(checkpoint("llama"), tmp_path / "out", "quark_mxfp4", options=options)
    assert [each.message for each in caplog.records if "changes nothing" in each.message] == [
        "--kernel linear=torch changes nothing: a conversion computes nothing with its weights"
    ]
    strict = LoadOptions(kernels={"linear": "torch"}, strict=True)
    with pytest.raises(UnappliedOptionError):
        convert_checkpoint(checkpoint("llama"), tmp_path / "other", "quark_mxfp4", options=strict)


def test_plan_says_it_in_its_output_and_its_json(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantload", "plan", str(checkpoint("llama_tied")), "--override", "lm_*=mxfp8"]

    def run(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().out
        return 0, capsys.readouterr().out

    message = f"--override lm_*=mxfp8 changes nothing: {TIED} (lm_head)"
    code, out = run()
    assert (code, f"warning: {message}" in out.splitlines()) == (0, True)
    (entry,) = json.loads(run("--json")[1])["unapplied"]
    assert entry == {
        "message": message, "option": "--override lm_*=mxfp8", "reason": TIED, "modules": ["lm_head"],
        "is_unmatched": False,
    }  # fmt: skip
    assert run("--strict")[0] == 2
