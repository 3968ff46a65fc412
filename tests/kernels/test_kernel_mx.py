"""MXFP6 and MXFP8: bytes equal those of the reference tools, elements are the nearest there are."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from quantload.kernels.mx_elements import ELEMENTS, code_values
from quantload.kernels.reference.mx import pack_fp6, unpack_fp6
from runners import Runner
from tested_formats import MXFP6

SETS = ("gauss", "ties", "zeros")
KEYS = {"mxfp6_e2m3": ("e2m3", "even"), "mxfp6_e3m2": ("e3m2", "even"), "mxfp8": ("e4m3", "rceil")}


def codes_of(name: str, stored: torch.Tensor) -> np.ndarray:
    """One code per element, -0 as 0."""
    raw = stored.view(torch.uint8)
    codes = raw.numpy() if name == "mxfp8" else unpack_fp6(raw).numpy().astype(np.uint8)
    return np.where(codes == (0x80 if name == "mxfp8" else 0x20), 0, codes)


def source_of(vectors: dict[str, np.ndarray], name: str) -> torch.Tensor:
    return torch.from_numpy(vectors[f"{name}|in"].astype(np.int16)).view(torch.bfloat16)


@pytest.mark.formats(*MXFP6)
@pytest.mark.interpreted(dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_mxfp6_equals_every_even_vector(
    runner: Runner, vectors: dict[str, np.ndarray], name: str, dtype: torch.dtype
) -> None:
    assert compare(runner, vectors, name, dtype) >= 3


@pytest.mark.formats("mxfp8")
@pytest.mark.interpreted(dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_mxfp8_equals_every_rceil_vector(
    runner: Runner, vectors: dict[str, np.ndarray], name: str, dtype: torch.dtype
) -> None:
    assert compare(runner, vectors, name, dtype) >= 3


def compare(runner: Runner, vectors: dict[str, np.ndarray], name: str, dtype: torch.dtype) -> int:
    """How many tools made the bytes that the runner makes; fails where one did not."""
    fmt = runner.format.name
    element, mode = KEYS[fmt]
    stored, made = runner.quantize(source_of(vectors, name).to(dtype))
    codes, scales = codes_of(fmt, stored), made.numpy()
    keys = [
        key
        for key in vectors
        if key.startswith(f"{name}|") and key.split(":")[-1] in (f"{element}|{mode}|c", f"{element}p|{mode}|c")
    ]
    for key in keys:
        theirs = torch.from_numpy(vectors[key].copy())
        want = codes_of(fmt if key.endswith(f"p|{mode}|c") else "mxfp8", theirs)
        want = np.where(want == 0x20, 0, want) if fmt != "mxfp8" else want
        want_scales = vectors[f"{key[:-1]}s"]
        used = np.ones_like(scales, bool)
        if "torchao018" in key and name == "zeros":  # differs on blocks of BF16 subnormals
            magnitude = vectors[f"{name}|in"].astype(np.int32) & 0x7FFF
            used = magnitude.reshape(16, 8, 32).max(-1) >= 0x480
        np.testing.assert_array_equal(codes[np.repeat(used, 32, 1)], want[np.repeat(used, 32, 1)], err_msg=key)
        nonzero = codes.reshape(16, 8, 32).any(-1) & used
        assert nonzero.any()
        np.testing.assert_array_equal(scales[nonzero], want_scales[nonzero], err_msg=key)
    return len(keys)


@pytest.mark.formats(*MXFP6)
@pytest.mark.interpreted
def test_mxfp6_is_the_nearest_value_with_ties_to_even(runner: Runner) -> None:
    check_nearest(runner)


@pytest.mark.formats("mxfp8")
def test_mxfp8_is_the_nearest_value_with_ties_to_even(runner: Runner) -> None:
    check_nearest(runner)


def check_nearest(runner: Runner) -> None:
    """Against exact rational arithmetic: every value, every midpoint, and their neighbours, at several scales."""
    element = ELEMENTS[runner.format.name]
    grid = [Fraction(v) for v in code_values(element) if v <= element.largest]
    points = torch.tensor([float(v) for v in grid] + [float(a + b) / 2 for a, b in pairwise(grid)])
    near = torch.cat(
        (points, torch.nextafter(points, torch.tensor(9e9)), torch.nextafter(points, torch.tensor(0.0)))
    ).clamp(max=element.largest)
    near = torch.cat((near, torch.zeros(-len(near) % 31))).view(-1, 31)
    block = torch.cat((near, torch.full((len(near), 1), element.largest)), 1)
    block[:, ::2] *= -1
    for exponent in (-110, -7, 0, 40, 110):
        source = block * 2.0**exponent
        stored, scales = runner.quantize(source)
        assert (scales == 127 + exponent).all()
        raw = stored.view(torch.uint8)
        codes = raw if runner.format.name == "mxfp8" else unpack_fp6(raw)
        sign = 1 << (runner.format.code_bits - 1)
        for value, code in zip(block.flatten().tolist(), codes.flatten().tolist(), strict=True):
            distance = [abs(point - Fraction(abs(value))) for point in grid]
            _, _, best = min((away, point % 2, point) for point, away in enumerate(distance))
            assert code % sign == best, (exponent, value)
            assert bool(code & sign) == (torch.signbit(torch.tensor(value)).item()), (exponent, value)


def test_mxfp6_codes_are_packed_little_endian() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 63, 0, 0, 32]], dtype=torch.int32)
    packed = pack_fp6(codes)
    assert packed.tolist() == [[1 | 2 << 6 & 255, (2 >> 2) | (3 << 4), 3 >> 4 | 4 << 2, 63, 0, 32 << 2]]
    assert torch.equal(unpack_fp6(packed), codes)
