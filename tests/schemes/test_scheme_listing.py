"""What the listing of schemes says about kernels that cannot run."""

from __future__ import annotations

import pytest
import torch
from quantload.schemes.listing import list_schemes


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_kernels_for_a_gpu_that_is_not_here_are_listed_with_the_reason():
    rows = {row["name"]: row for row in list_schemes("cuda")}
    assert rows["quark_mxfp4"]["kernels"] == "torch"
    assert "no GPU" in rows["quark_mxfp4"]["unavailable"]["triton"]
    assert "numba" not in rows["quark_mxfp4"]["unavailable"]
    assert rows["none"]["unavailable"] == {}


def test_nothing_for_a_cpu_is_unavailable_on_it():
    reasons = {reason for row in list_schemes("cpu") for reason in row["unavailable"].values()}
    assert reasons <= {"has no kernels for this format"}
