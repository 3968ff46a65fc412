"""Which module gets which scheme: the patterns, their order, and what is said about those that match nothing."""

from __future__ import annotations

import logging

import pytest
import torch
from quantload.errors import PolicyError, UnknownSchemeError, UnmatchedPatternError
from quantload.options import LoadOptions, QuantizationPolicy
from quantload.schemes.policy import Policy, choose_policy, matches, name_reason
from quantload.schemes.registry import SchemeFactory

Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts"


def at_work(**values: object) -> Policy:
    return Policy(QuantizationPolicy.from_mapping(values), SchemeFactory(torch.device("cpu"), LoadOptions()))


def linear(policy: Policy, name: str, reason: str | None = None) -> str:
    """The scheme's name, or the reason there is none."""
    choice = policy.linear(name, reason)
    return choice.reason if choice.scheme is None else choice.scheme.name


def experts(policy: Policy, name: str = EXPERTS) -> str:
    choice = policy.experts(name, None)
    return choice.reason if choice.scheme is None else choice.scheme.name


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        (Q, True),
        ("q_proj", False),
        ("*q_proj", True),
        ("*.self_attn.*", True),
        ("model.layers.?.self_attn.[qk]_proj", True),
        ("MODEL*", False),
        ("re:.*q_proj", True),
        ("re:q_proj", False),  # the whole name has to match
        (r"re:model\.layers\.(0|1)\..*", True),
        (r"re:model\.layers\.[1-9]\..*", False),
    ],
)
def test_patterns(pattern: str, fits: bool) -> None:
    assert matches(pattern, Q) is fits


@pytest.mark.parametrize("where", ["ignore", "overrides"])
def test_a_pattern_that_is_no_regular_expression(where: str) -> None:
    policy = at_work(**{where: ["re:(q"] if where == "ignore" else {"re:(q": "none"}})
    with pytest.raises(PolicyError, match=r"pattern 're:\(q' is not a regular expression"):
        policy.linear(Q, None)


def test_one_scheme_for_everything() -> None:
    policy = at_work(linear="int8_per_channel")
    assert (linear(policy, Q), experts(policy), policy.name) == (("int8_per_channel",) * 3)


def test_another_scheme_for_experts() -> None:
    policy = at_work(linear="fp8_per_channel", experts="quark_mxfp4")
    assert (linear(policy, Q), experts(policy)) == ("fp8_per_channel", "quark_mxfp4")
    assert policy.name == "fp8_per_channel+quark_mxfp4"


def test_experts_only() -> None:
    policy = at_work(linear="experts_int8")
    assert linear(policy, Q) == "experts_int8 leaves linear layers as stored"
    assert experts(policy) == "experts_int8"


def test_none_leaves_both_with_a_reason() -> None:
    policy = at_work(linear="none")
    assert (linear(policy, Q), experts(policy)) == (
        "none leaves linear layers as stored",
        "none leaves experts as stored",
    )


def test_ignore_names_its_pattern() -> None:
    policy = at_work(ignore=["*k_proj", "*q_proj"])
    assert linear(policy, Q) == "ignored by pattern '*q_proj'"
    assert linear(policy, Q.replace("q_", "v_")) == "quark_mxfp4"
    assert experts(at_work(ignore=["*experts"])) == "ignored by pattern '*experts'"


def test_the_first_override_wins() -> None:
    policy = at_work(overrides=[("*q_proj", "int8_per_channel"), ("*", "fp8_per_block")])
    assert linear(policy, Q) == "int8_per_channel"
    assert linear(policy, Q.replace("q_", "k_")) == "fp8_per_block"
    assert experts(policy) == "fp8_per_block"


def test_overrides_win_over_ignore_and_over_the_built_in_reasons() -> None:
    policy = at_work(overrides={"*q_proj": "int8_per_channel", "lm_head": "fp8_per_channel"}, ignore=["*"])
    assert linear(policy, Q) == "int8_per_channel"
    assert linear(policy, "lm_head", "output head") == "fp8_per_channel"
    assert linear(policy, "model.layers.0.mlp.up_proj") == "ignored by pattern '*'"


def test_the_built_in_reasons_can_be_switched_off() -> None:
    assert linear(at_work(), "lm_head", "output head") == "output head"
    assert linear(at_work(default_ignore=False), "lm_head", "output head") == "quark_mxfp4"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.mlp.gate", "router or gate"),
        ("model.layers.0.feed_forward.router", "router or gate"),
        ("model.layers.0.mlp.shared_expert_gate", "router or gate"),
        ("gate", "router or gate"),
        ("model.embed_tokens", "embedding"),
        ("transformer.wte", "embedding"),
        ("lm_head", "output head"),
        ("model.layers.0.mlp.gate_proj", None),
        ("model.layers.0.mlp.gate_up_proj", None),
        ("model.gate.q_proj", None),
        (Q, None),
    ],
)
def test_what_is_kept_by_name(name: str, reason: str | None) -> None:
    assert name_reason(name) == reason


def test_a_pattern_that_matches_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    policy = at_work(ignore=["*q_proj", "layers.9.*"], overrides={"re:nothing": "none"})
    linear(policy, Q)
    with caplog.at_level(logging.WARNING, logger="quantload"):
        policy.check_patterns(strict=False)
    (record,) = caplog.records
    assert "'layers.9.*'" in record.message
    assert "'re:nothing'" in record.message
    assert "'*q_proj'" not in record.message


def test_and_an_error_in_strict_mode() -> None:
    policy = at_work(ignore=["layers.9.*"])
    linear(policy, Q)
    with pytest.raises(UnmatchedPatternError, match=r"'layers\.9\.\*'; module names look like"):
        policy.check_patterns(strict=True)


def test_the_same_pattern_twice_means_the_first() -> None:
    assert linear(at_work(overrides=[("*", "int8_per_channel"), ("*", "none")]), Q) == "int8_per_channel"


def test_a_pattern_in_the_shadow_of_another_one_still_matches_something() -> None:
    policy = at_work(overrides=[("*", "int8_per_channel"), ("*q_proj", "none")], ignore=["model.*", "*q_proj"])
    assert linear(policy, Q) == "int8_per_channel"
    policy.check_patterns(strict=True)


@pytest.mark.parametrize(
    "values", [{"linear": "mxfp5"}, {"experts": "mxfp5"}, {"overrides": {"*": "mxfp5"}}], ids=lambda v: next(iter(v))
)
def test_an_unknown_scheme_is_an_error_before_anything_is_read(values: dict[str, object]) -> None:
    with pytest.raises(UnknownSchemeError, match="unknown scheme 'mxfp5'; did you mean mxfp8 or mxfp4"):
        at_work(**values)


def test_the_scheme_that_was_asked_for_replaces_that_of_the_policy() -> None:
    policy = QuantizationPolicy(linear="fp8_per_block", ignore=("a",))
    assert choose_policy("auto", policy) == policy
    assert choose_policy("ptpc_fp8", policy) == QuantizationPolicy(linear="ptpc_fp8", ignore=("a",))
    assert choose_policy("auto", None) == QuantizationPolicy(linear="quark_mxfp4")
    assert choose_policy("int8_per_channel", None).linear == "int8_per_channel"


def test_an_alias_is_said_once_to_be_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="quantload"):
        at_work(linear="fp8_per_channel", overrides={"a": "int8_per_channel"})
        assert caplog.messages == []
        policy = at_work(linear="ptpc_fp8", overrides={"a": "ptpc_fp8"})
    assert caplog.messages == ["ptpc_fp8 is fp8_per_channel, its name in reports and metrics"]
    assert policy.name == linear(policy, Q) == "fp8_per_channel"


def test_a_quantized_checkpoint_stays_as_it_is_unless_a_scheme_is_named() -> None:
    ignoring = QuantizationPolicy(ignore=("a",))
    assert choose_policy("auto", ignoring, is_quantized=True) == QuantizationPolicy(linear="none", ignore=("a",))
    assert choose_policy("auto", ignoring) == QuantizationPolicy(linear="quark_mxfp4", ignore=("a",))
    assert choose_policy("ptpc_fp8", None, is_quantized=True).linear == "ptpc_fp8"
    named = QuantizationPolicy(linear="quark_mxfp4")
    assert choose_policy("auto", named, is_quantized=True) == named
    everywhere = QuantizationPolicy(linear="mxfp8", experts="auto", overrides=(("a", "auto"), ("b", "mxfp8")))
    as_stored = QuantizationPolicy(linear="mxfp8", experts="none", overrides=(("a", "none"), ("b", "mxfp8")))
    assert choose_policy("auto", everywhere, is_quantized=True) == as_stored
    assert choose_policy("auto", everywhere) == everywhere


FUSED = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]


def test_layers_that_run_as_one_get_one_scheme() -> None:
    policy = at_work(overrides={"*.q_proj": "mxfp8", "*.[kv]_proj": "mxfp8"})
    choice = policy.fused(FUSED)
    assert choice.scheme is policy.linear(Q, None).scheme
    policy.check_patterns(strict=True)
    kept = at_work(ignore=["*.q_proj", "*.k_proj", "*.v_proj"]).fused(FUSED)
    assert (kept.scheme, kept.reason) == (None, "ignored by pattern '*.q_proj'")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ignore": ["*.k_proj"]}, r"q_proj: quark_mxfp4; .*k_proj: ignored by pattern '\*.k_proj'; .*v_proj: quark"),
        ({"overrides": {"*.v_proj": "mxfp8"}}, r"q_proj: quark_mxfp4; .*v_proj: mxfp8"),
    ],
)
def test_layers_that_run_as_one_are_named_where_they_differ(values: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        at_work(**values).fused(FUSED)


def test_names_that_are_kept_are_kept_where_they_are_fused() -> None:
    assert at_work().fused(["model.layers.0.mlp.gate"]).reason == "router or gate"
