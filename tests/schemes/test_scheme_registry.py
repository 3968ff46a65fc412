"""The names a user can give, and the kernels behind them."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from quantload.errors import NoKernelError, PolicyError
from quantload.kernels import registry as kernel_registry
from quantload.options import LoadOptions
from quantload.schemes.base import LinearScheme, MoeQuantizationCallbacks, MoEScheme
from quantload.schemes.listing import list_schemes
from quantload.schemes.names import ALIASES, SCHEME_NAMES
from quantload.schemes.registry import ENTRIES, SchemeFactory, choose_device, get_entry

CPU = torch.device("cpu")
META = torch.device("meta")


def factory(**options: Any) -> SchemeFactory:
    return SchemeFactory(CPU, LoadOptions(**options))


def test_the_registry_has_a_scheme_for_each_name() -> None:
    assert ("auto", *(name for entry in ENTRIES for name in (entry.name, *entry.aliases))) == SCHEME_NAMES
    assert get_entry("auto") is get_entry("quark_mxfp4")
    assert all(get_entry(alias) is get_entry(name) for alias, name in ALIASES.items())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_makes_what_it_says(entry: Any) -> None:
    linear, experts = factory().linear(entry.name), factory().experts(entry.name)
    assert (linear is None) == (entry.linear is None)
    assert (experts is None) == (entry.experts is None)
    assert linear is None or isinstance(linear, LinearScheme)
    if experts is not None:
        assert isinstance(experts, MoEScheme)
        assert isinstance(experts, MoeQuantizationCallbacks)
    if entry.name != "experts_int8" and linear is not None:
        assert linear.name == entry.name
        assert experts is not None
        assert (experts.kernels.format is linear.kernels.format) == (entry.name != "quark_int4fp8_moe")


def test_one_instance_a_name_and_kind() -> None:
    schemes = factory()
    assert schemes.linear("fp8_per_channel") is schemes.linear("ptpc_fp8")
    assert schemes.linear("int8_per_channel") is not schemes.linear("fp8_per_channel")


def test_experts_int8_is_called_what_the_user_called_it() -> None:
    experts = factory().experts("experts_int8")
    assert experts is not None
    assert experts.name == "experts_int8"
    with pytest.raises(PolicyError, match=r"^experts_int8 has no scale mode 'mse'"):
        SchemeFactory(CPU, LoadOptions(), "mse").experts("experts_int8")


def test_an_alias_is_named_with_what_it_stands_for() -> None:
    entry = get_entry("ptpc_fp8")
    assert [entry.called(name) for name in ("ptpc_fp8", "fp8_per_channel")] == [
        "ptpc_fp8 (fp8_per_channel)",
        "fp8_per_channel",
    ]
    assert get_entry("auto").called("auto") == "quark_mxfp4"
    scheme = factory().linear("ptpc_fp8")
    assert scheme is not None
    assert (scheme.name, scheme.called) == ("fp8_per_channel", "ptpc_fp8 (fp8_per_channel)")
    with pytest.raises(PolicyError, match=r"^ptpc_fp8 \(fp8_per_channel\) has no scale mode 'mse'"):
        SchemeFactory(CPU, LoadOptions(), "mse").experts("ptpc_fp8")
    with pytest.raises(PolicyError, match=r"^ptpc_fp8 \(fp8_per_channel\): fp8_channel weights do not go with mxfp4"):
        factory(activations="mxfp4").linear("ptpc_fp8")


def test_a_device_without_kernels_gets_every_candidate_with_its_reason() -> None:
    with pytest.raises(NoKernelError) as caught:
        SchemeFactory(META, LoadOptions()).linear("quark_mxfp4")
    message = str(caught.value)
    candidates = kernel_registry.candidates("quantize", "mxfp4", "meta")
    assert candidates
    for kernel, reason in candidates:
        assert reason is not None
        assert f"{kernel.name}: {reason}" in message
    assert "quantize of mxfp4 on meta" in message


def test_a_kernel_can_be_chosen_by_hand() -> None:
    names = factory(kernels={"quantize": "torch"}).linear("quark_mxfp4")
    assert names is not None
    assert names.kernels.names["quantize"] == "torch"
    assert names.kernels.names["linear"] == "numba"
    assert names.kernel_names.startswith("quantize=torch, ")


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"linear": "aiter"}, r"no kernel 'aiter' for linear .* numba: can run; torch: can run"),
    ],
)
def test_a_kernel_that_is_not_there(kernels: dict[str, str], message: str) -> None:
    with pytest.raises(NoKernelError, match=message):
        factory(kernels=kernels).linear("quark_mxfp4")


def test_a_kernel_operation_that_is_not_there() -> None:
    with pytest.raises(PolicyError, match="the operation 'multiply'; operations are quantize, "):
        factory(kernels={"multiply": "torch"})
    with pytest.raises(PolicyError, match=r"'foo' for linear; kernels for it are .*numba, torch"):
        factory(kernels={"linear": "foo"})


def test_activations_that_do_not_go_with_the_weights() -> None:
    with pytest.raises(PolicyError, match="fp8_per_channel: fp8_channel weights do not go with mxfp4 activations"):
        factory(activations="mxfp4").linear("fp8_per_channel")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == CPU
    assert choose_device(META) == META
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU


@pytest.mark.parametrize("has_kernels", [True, False])
def test_auto_takes_the_accelerator_only_where_it_has_kernels(
    has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = kernel_registry.candidates("quantize", "mxfp4", "cpu")[0][0]
    device_type = "cuda" if has_kernels else "cpu"
    own = replace(kernel, device_type=device_type)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_registry, "candidates", lambda *_: [(own, None)])
    assert choose_device("auto").type == device_type


@pytest.mark.parametrize("device", ["gpu", "cpu:x", ""])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(PolicyError, match="choose auto, cpu, or a torch device"):
        choose_device(device)


def test_the_listing_has_a_row_for_every_scheme() -> None:
    rows = list_schemes("cpu")
    assert [row["name"] for row in rows] == [entry.name for entry in ENTRIES]
    by_name = {row["name"]: row for row in rows}
    assert by_name["quark_mxfp4"]["kernels"] == "numba"
    assert by_name["fp8_per_channel"]["aliases"] == ["ptpc_fp8"]
    assert by_name["none"]["kernels"] == "-"
    assert (by_name["experts_int8"]["linear"], by_name["experts_int8"]["experts"]) == (False, True)


def test_the_listing_says_why_a_device_has_none() -> None:
    (row, *_) = list_schemes("meta")
    assert row["kernels"].startswith("none: no kernel for quantize of mxfp4 on meta; candidates:")


def test_kernels_are_compiled_in_another_thread_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], int]] = []
    started, planned = threading.Event(), threading.Event()

    def prepare(functions: list[str]) -> None:
        started.set()
        assert planned.wait(10)
        seen.append((functions, threading.get_ident()))

    monkeypatch.setattr(kernel_registry, "needed_to_load", lambda name, *_, **__: [name])
    monkeypatch.setattr(kernel_registry, "prepare", prepare)
    schemes = factory()
    schemes.linear("quark_mxfp4")
    schemes.experts("experts_int8")
    with schemes.compiling(torch.bfloat16):
        assert started.wait(10)
        planned.set()
    (functions, thread), (others, _) = seen
    assert functions == ["mxfp4", "int8_channel"]
    assert thread != threading.get_ident()
    assert others == []


def test_what_other_weights_call_is_compiled_before_the_first_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[str, ...]]] = []
    monkeypatch.setattr(kernel_registry, "needed_to_load", lambda name, _, dtype, *__, **___: [(name, str(dtype))])
    monkeypatch.setattr(kernel_registry, "needed_to_read", lambda name, _: [("read", name)])
    monkeypatch.setattr(kernel_registry, "prepare", seen.append)
    schemes = factory()
    schemes.linear("quark_mxfp4")
    with schemes.compiling(torch.bfloat16):
        schemes.expect(torch.bfloat16)
        schemes.expect(torch.float16)
    assert seen == [[("mxfp4", "torch.bfloat16")], [("mxfp4", "torch.float16")]]
    seen.clear()
    schemes = factory()
    schemes.linear("quark_mxfp4")
    with schemes.compiling(torch.bfloat16):
        schemes.dequantizer("fp8_block")
    assert seen[1:] == [[("read", "fp8_block"), ("mxfp4", "torch.float32")]]


def test_what_goes_wrong_while_compiling_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(functions: list[object]) -> None:
        raise OSError("no compiler today")

    monkeypatch.setattr(kernel_registry, "prepare", prepare)
    schemes = factory()
    schemes.linear("quark_mxfp4")
    before = threading.active_count()
    with pytest.raises(OSError, match="no compiler today"), schemes.compiling(torch.bfloat16):
        pass
    assert threading.active_count() == before
