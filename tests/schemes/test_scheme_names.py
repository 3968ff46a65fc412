"""Names of schemes: their spelling, the names other tools use, and what a wrong one could have meant."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from quantload.errors import UnknownSchemeError
from quantload.options import QuantizationPolicy
from quantload.schemes.names import ALIASES, SCHEME_NAMES, aliases_of, known_name


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_case_and_hyphens_do_not_matter(name: str) -> None:
    assert known_name(name) == known_name(name.upper()) == known_name(f" {name.replace('_', '-')} ") == name


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("mxfp4", "quark_mxfp4"), ("int8", "int8_per_channel"), ("int4", "int4_per_group"),
        ("ptpc_fp8", "fp8_per_channel"),
    ],
)  # fmt: skip
def test_names_of_other_tools_that_mean_one_scheme(name: str, scheme: str) -> None:
    assert ALIASES[name] == scheme
    assert name in aliases_of(scheme)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fp8", ["fp8_per_channel", "fp8_per_tensor", "fp8_per_block"]), ("MXFP6", ["mxfp6_e2m3", "mxfp6_e3m2"]),
        ("fp8_e4m3", ["fp8_per_channel", "fp8_per_tensor", "fp8_per_block"]), ("quark_mxpf4", ["quark_mxfp4"]),
        ("awq", ["int4_per_group"]), ("w8a8", ["int8_per_channel"]), ("nvpf4", ["nvfp4"]), ("bf16", ["none"]),
        ("int8_dynamic", ["int8_per_channel"]), ("fp8-per-chanel", ["fp8_per_channel"]),
    ],
)  # fmt: skip
def test_a_wrong_name_says_what_was_meant(name: str, meant: list[str]) -> None:
    with pytest.raises(UnknownSchemeError) as caught:
        known_name(name)
    message = str(caught.value)
    said = message.partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert set(meant) <= set(said)
    assert repr(name) in message


@pytest.mark.parametrize("name", ["", "llama", None, ["none"], 4])
def test_any_other_name_lists_those_there_are(name: Any) -> None:
    with pytest.raises(UnknownSchemeError) as caught:
        known_name(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "did you mean" not in message
    assert all(known in message for known in SCHEME_NAMES)


@pytest.mark.parametrize("values", [{"linear": "mxfp5"}, {"experts": "fp8"}, {"overrides": {"*": "mxfp5"}}])
def test_a_policy_checks_its_names(values: dict[str, Any]) -> None:
    with pytest.raises(UnknownSchemeError, match="did you mean"):
        QuantizationPolicy(**values)


def test_a_policy_has_names_as_they_are_registered() -> None:
    policy = QuantizationPolicy(linear="MXFP4", experts="INT8-per-channel", overrides=(("a", "None"),))
    assert (policy.linear, policy.experts, policy.overrides) == ("mxfp4", "int8_per_channel", (("a", "none"),))


def test_names_are_checked_before_torch_is_imported() -> None:
    code = (
        "import sys, quantload.cli as cli\n"
        "sys.argv = ['quantload', 'load', '-q', 'fp8']\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "2 False"
    assert "did you mean fp8_per_channel or" in ran.stderr
