"""Every kernel that the registry says can run here, as a parametrized fixture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantload.kernels.registry import (
    SCALE_MODES,
    needed_to_load,
    prepare,
)
from runners import CALLED, Runner, runners
from tested_formats import NUMBA_FORMATS, QUANTIZED

HERE = Path(__file__).parent
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HOW: tuple[dict[str, Any], ...] = ({"statistics": True}, {"statistics": False}, {"scale_mode": "mse"})

PLAIN = ("torch", "cpu")
"""The kernels that the `contender` fixture leaves out, because it is compared with them."""


@pytest.fixture(autouse=True)
def called_kernels(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """The interpreted kernels that a test called, in its report."""
    CALLED.clear()
    yield
    for label in sorted(CALLED):
        record_property("kernel", label)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile what a run of this whole folder needs at once, which its processes share.

    Else it would be compiled by a process for nearly every kernel, each of which has to get ready for that first.
    """
    if session.config.getoption("collectonly") or not _is_asked_for_as_a_whole(session.config):
        return
    tested = {runner.format.name for item in session.items if (runner := _runner_of(item)) is not None}
    wanted = itertools.product(sorted(tested), DTYPES, HOW)
    prepare(
        [
            function
            for name, dtype, how in wanted
            if name in NUMBA_FORMATS and name in SCALE_MODES[how.get("scale_mode", "default")]
            for function in needed_to_load(name, "cpu", dtype, activation_dtype=dtype, **how)
        ]
    )


def _is_asked_for_as_a_whole(config: pytest.Config) -> bool:
    """Whether a folder that holds all tests here was named, or none, and no tests by name."""
    folders = (config.invocation_params.dir / argument for argument in config.args)
    return not config.getoption("keyword") and any(HERE.is_relative_to(folder.resolve()) for folder in folders)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`runner` and `contender` are of all formats, or of those in the test's `@pytest.mark.formats(name, ...)`."""
    marked = metafunc.definition.get_closest_marker("formats")
    wanted = QUANTIZED if marked is None else marked.args
    if not set(wanted) <= set(QUANTIZED):
        raise ValueError(f"{metafunc.function.__name__} is marked with formats that are not tested here: {wanted}")
    for fixture in {"runner", "contender"} & set(metafunc.fixturenames):
        params = [
            pytest.param(r, id=f"{r.format.name}-{r.kernels.names['quantize']}-{r.device}")
            for r in runners()
            if r.format.name in wanted and (fixture == "runner" or (r.kernels.names["quantize"], r.device) != PLAIN)
        ]
        metafunc.parametrize(fixture, params)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m interpreted_quickly` are the tests with `@pytest.mark.interpreted`, of the parameters that it names, if any.

    `formats=` names those of the runner.
    """
    for item in items:
        marker = item.get_closest_marker("interpreted")
        if marker is not None and _is_chosen(item, **marker.kwargs):
            item.add_marker("interpreted_quickly")


def _is_chosen(item: pytest.Item, formats: Container[str] | None = None, **parameters: object) -> bool:
    runner, given = _runner_of(item), _parameters_of(item)
    if formats is not None and (runner is None or runner.format.name not in formats):
        return False
    return all(given[name] == value for name, value in parameters.items())


def _runner_of(item: pytest.Item) -> Runner | None:
    """The kernels that a test is a test of, where it has a parameter for that."""
    given = _parameters_of(item)
    found = given.get("runner", given.get("contender"))
    return found if isinstance(found, Runner) else None


def _parameters_of(item: pytest.Item) -> dict[str, object]:
    given: dict[str, object] = item.callspec.params if hasattr(item, "callspec") else {}
    return given


@pytest.fixture(scope="session")
def vectors(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """What reference tools make of the same BF16 bits: `set|in`, `set|tool:format|mode|c` (codes), `...|s` (scales).

    AMD Quark, torchao (0.18 and a later head), compressed-tensors, AMD aiter, vLLM and SGLang, run on a CPU;
    `quark_llama:*` are two weights of a tiny checkpoint that Quark exported. MXFP6 and MXFP8 have a file, and INT4.
    """
    found: dict[str, np.ndarray] = {}
    for name in ("vectors.npz", "vectors_mx.npz", "vectors_int4.npz"):
        with np.load(request.config.rootpath / "tests" / "data" / name) as stored:
            found.update(stored)
    return found


@pytest.fixture(scope="session")
def all_bf16() -> torch.Tensor:
    """Every finite BF16 value, both zeros included: 65280 of them."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values[torch.isfinite(values)]


@pytest.fixture(scope="session")
def all_f16() -> torch.Tensor:
    """Every finite FP16 value: 63488 of them."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return values[torch.isfinite(values)]
