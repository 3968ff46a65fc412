"""What the listing of schemes says about kernels that cannot run."""

from __future__ import annotations

import io

import pytest
import torch
from quantload.schemes.listing import list_schemes, print_schemes
from quantload.schemes.support_tables import support_tables
from rich.console import Console


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_kernels_for_a_gpu_that_is_not_here_are_listed_with_the_reason() -> None:
    rows = {row["name"]: row for row in list_schemes("cuda")}
    assert rows["quark_mxfp4"]["kernels"] == "torch"
    assert "no GPU" in rows["quark_mxfp4"]["unavailable"]["triton"]
    assert "numba" not in rows["quark_mxfp4"]["unavailable"]
    assert rows["none"]["unavailable"] == {}


def test_nothing_for_a_cpu_is_unavailable_on_it() -> None:
    reasons = {reason for row in list_schemes("cpu") for reason in row["unavailable"].values()}
    assert reasons <= {"has no kernels for this format"}


def printed(width: int) -> str:
    text = io.StringIO()
    print_schemes("cpu", Console(file=text, width=width, force_terminal=True, color_system=None))
    return text.getvalue()


def test_a_terminal_gets_whole_words() -> None:
    out = printed(80)
    words = {word for table in support_tables() for row in table.rows for cell in row for word in cell.split()}
    assert words <= set(out.split())
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_terminal_too_narrow_for_words_gets_all_letters() -> None:
    out = printed(40)
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 40
