"""Options and policies: frozen, checked, and strict about what they do not know."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import pickle
import textwrap
from dataclasses import replace
from typing import Any

import pytest
from quantload import LoadOptions, QuantizationPolicy, load_quantized, plan_quantized
from quantload.cli import DEMO_MODEL
from quantload.errors import PolicyError


def test_defaults() -> None:
    options = LoadOptions()
    assert options.chunk_bytes == 8 << 20
    assert (options.staging_bytes, options.max_memory, options.workers) == (None, None, None)
    assert options.worker_count() == len(os.sched_getaffinity(0))
    assert LoadOptions(workers=3).worker_count() == 3
    assert QuantizationPolicy() == QuantizationPolicy("auto", None, (), (), True, "default")


@pytest.mark.parametrize("cls", [LoadOptions, QuantizationPolicy])
def test_frozen(cls: Any) -> None:
    value = cls()
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


@pytest.mark.parametrize("cls", [LoadOptions, QuantizationPolicy])
def test_a_docstring_stands_under_every_field(cls: Any) -> None:
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(found, ast.ClassDef)
    documented = [
        field.target.id
        for field, below in itertools.pairwise(found.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    ]
    assert documented == [field.name for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk_bytes": 4095}, "chunk_bytes is 4095; give at least 4096"),
        ({"workers": 0}, "workers is 0"),
        ({"page_cache": "burn"}, "page_cache is 'burn'; choose auto, keep or drop"),
        ({"activations": "some"}, "activations is 'some'; choose one of auto, none, emulate, mxfp4, mxfp6_e3m2"),
        ({"retries": -1}, "retries is -1"),
        ({"connections": 0}, "connections is 0"),
        ({"connections": 257}, "connections is 257; give 1 to 256"),
        ({"staging_bytes": 0}, "staging_bytes is 0; give a positive number"),
        ({"max_memory": -5}, "max_memory is -5"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        LoadOptions(**values)
    with pytest.raises(PolicyError, match=message):
        LoadOptions.from_mapping(values)


@pytest.mark.parametrize("cls", [LoadOptions, QuantizationPolicy])
def test_an_unknown_key_is_an_error_that_lists_the_known_ones(cls: Any) -> None:
    with pytest.raises(PolicyError) as caught:
        cls.from_mapping({"chunk": 1, "lineer": 2})
    message = str(caught.value)
    assert message.startswith(f"{cls.__name__} does not know 'chunk', 'lineer'; it knows ")
    assert all(field.name in message for field in dataclasses.fields(cls))


def test_options_from_a_mapping() -> None:
    assert LoadOptions.from_mapping({}) == LoadOptions()
    assert LoadOptions.from_mapping({"workers": 2, "stats": False}) == LoadOptions(workers=2, stats=False)


@pytest.mark.parametrize(
    "overrides",
    [{"a": "none", "b": "fp8_per_block"}, [["a", "none"], ["b", "fp8_per_block"]]],
    ids=["mapping", "pairs"],
)
def test_a_policy_from_parsed_json(overrides: Any) -> None:
    policy = QuantizationPolicy.from_mapping({"linear": "none", "ignore": ["x", "y"], "overrides": overrides})
    assert policy == QuantizationPolicy(
        linear="none", ignore=("x", "y"), overrides=(("a", "none"), ("b", "fp8_per_block"))
    )
    assert hash(policy) == hash(policy)


@pytest.mark.parametrize(
    "values",
    [
        {"workers": "2"}, {"workers": 2.5}, {"workers": True}, {"chunk_bytes": True}, {"chunk_bytes": None},
        {"max_memory": "16"}, {"max_memory": 1.5}, {"staging_bytes": "much"}, {"cache_bytes": b"1GiB"},
        {"retries": 1.5}, {"connections": "8"}, {"stats": "off"}, {"strict": "no"}, {"kernels": None},
    ],
)  # fmt: skip
def test_values_of_the_wrong_type(values: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(values))):
        LoadOptions(**values)


@pytest.mark.parametrize("name", ["chunk_bytes", "staging_bytes", "max_memory", "cache_bytes"])
def test_sizes_may_have_units(name: str) -> None:
    in_text: dict[str, Any] = {name: "1.5GiB"}
    in_bytes: dict[str, Any] = {name: 3 << 29}
    options = LoadOptions(**in_text)
    assert getattr(options, name) == 3 << 29
    assert options == LoadOptions(**in_bytes) == replace(options) == pickle.loads(pickle.dumps(options))
    assert f"{name}={3 << 29}" in repr(options)


def test_a_pattern_is_not_taken_apart_into_letters() -> None:
    with pytest.raises(PolicyError, match="give a tuple of patterns"):
        QuantizationPolicy(ignore="*q_proj")  # type: ignore[arg-type]


@pytest.mark.parametrize("overrides", [("a=b",), (("a",),), (("a", 3),)])
def test_overrides_that_are_no_pairs(overrides: Any) -> None:
    with pytest.raises(PolicyError, match="pairs or a mapping"):
        QuantizationPolicy(overrides=overrides)


def test_overrides_may_be_a_mapping() -> None:
    assert QuantizationPolicy(overrides={"*": "none"}).overrides == (("*", "none"),)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["least", "", None])
def test_a_scale_mode_that_there_is_not(mode: Any) -> None:
    with pytest.raises(PolicyError, match=r"scale_mode is .*; choose default or mse"):
        QuantizationPolicy(scale_mode=mode)


@pytest.mark.parametrize("given", [{"policy": {"linear": "mxfp8"}}, {"options": {"strict": True}}])
@pytest.mark.parametrize("function", [load_quantized, plan_quantized])
def test_a_mapping_in_the_place_of_a_policy_or_options_is_an_error(given: dict[str, Any], function: Any) -> None:
    (name,) = given
    with pytest.raises(PolicyError, match=rf"^{name} is of type dict; give a \w+, of a mapping with \w+\.from_mapping"):
        function(DEMO_MODEL, **given)
