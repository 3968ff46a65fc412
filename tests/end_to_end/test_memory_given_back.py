"""What a load needed is free as soon as it is over, and a model with its last reference: no collector has to run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from quantload import LoadOptions, convert_checkpoint, load_quantized, plan_quantized
from quantload.model import coordinates
from quantload.online.storage import FinalStorage
from torch import Tensor

Checkpoint = Callable[[str], Path]
Left = Callable[[], tuple[int, int]]


@pytest.fixture
def left() -> Iterator[Left]:
    """How many tensors and storages there are that a test left behind, cycles included."""

    def count() -> tuple[int, int]:
        coordinates._on_meta.cache_clear()  # tensors without elements, kept for maps of the same shape
        kinds = [type(thing) for thing in gc.get_objects()]
        return sum(issubclass(kind, Tensor) for kind in kinds), kinds.count(FinalStorage)

    gc.collect()
    gc.disable()
    tensors, storages = count()

    def more() -> tuple[int, int]:
        now = count()
        return now[0] - tensors, now[1] - storages

    try:
        yield more
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "none"), ("llama", "fp8_per_tensor"), ("qwen3_moe", "quark_mxfp4"), ("gpt_oss", "auto")],
)
def test_after_a_load(name: str, scheme: str, checkpoint: Checkpoint, left: Left) -> None:
    path = checkpoint(name)
    model = load_quantized(path, scheme)
    assert left() > (0, 0)
    del model
    assert left() == (0, 0)


@pytest.mark.parametrize("scheme", ["auto", "mxfp6_e3m2"])
@pytest.mark.parametrize("name", ["native_llama_awq", "quark_qwen3moe_mxfp4", "quark_llama_fp8"])
def test_after_a_load_of_a_quantized_checkpoint(name: str, scheme: str, golden: Path, left: Left) -> None:
    model = load_quantized(golden / name, scheme)
    assert left() > (0, 0)
    del model
    assert left() == (0, 0)


def test_after_a_conversion_a_plan_and_the_cache(checkpoint: Checkpoint, tmp_path: Path, left: Left) -> None:
    path, options = checkpoint("qwen3_moe"), LoadOptions(cache=tmp_path / "cache")
    convert_checkpoint(path, tmp_path / "converted", "quark_mxfp4")
    assert left() == (0, 0)
    plan_quantized(path, "quark_mxfp4")
    assert left() == (0, 0)
    for result in ("written", "hit"):
        assert load_quantized(path, "quark_mxfp4", options=options).load_report.cache == result
        assert left() == (0, 0)


def test_after_a_load_that_failed(checkpoint: Checkpoint, left: Left) -> None:
    def cancel(read: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        load_quantized(checkpoint("qwen3_moe"), "quark_mxfp4", progress=cancel)
    assert left() == (0, 0)
