"""`MoeOnlineWeightLoader` with a scheme of the test's own: what it asks of the callbacks, and when."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.errors import NonFiniteWeightError, RepeatedRegionError, ShapeMismatchError
from quantload.geometry.layout import WeightLayout
from quantload.geometry.regions import Region
from quantload.kernels import statistics
from quantload.kernels.formats import Tensors, WeightFormat
from quantload.online.moe import MoeOnlineWeightLoader
from quantload.schemes.base import MoeQuantizationCallbacks, NonFiniteError, TensorStats, meta_parameter
from torch import Tensor, nn

EXPERTS, INTERMEDIATE, HIDDEN = 4, 6, 8
FORMAT = WeightFormat("rows of bytes", torch.uint8, torch.float32, 1, 0, 8)
TENSOR = WeightFormat("tensors of bytes", torch.uint8, torch.float32, 0, 0, 8)


class FakeCallbacks:
    """Keeps integer weights as they are, their largest value as the scale, and a diary."""

    def __init__(self) -> None:
        self.largest_piece = 0
        self.finished: list[nn.Module] = []
        self.busy, self.most_busy = 0, 0
        self._lock = threading.Lock()

    def get_quantized_dtype(self) -> torch.dtype:
        return torch.uint8

    def create_scale_tensors(self, layer: nn.Module, num_experts: int) -> None:
        for name, layout in layer.weight_layouts.items():  # type: ignore[operator, union-attr]
            layer.register_parameter(f"{name}_scale", meta_parameter(layout.shapes[1], torch.float32))

    def quantize_expert(self, weight: Tensor, tensors: Tensors, *, scales_known: bool = False) -> TensorStats:
        out, scale = tensors
        assert not weight.is_meta
        if not torch.isfinite(weight).all():
            raise NonFiniteError
        with self._lock:
            self.largest_piece = max(self.largest_piece, weight.numel())
        out.copy_(weight)
        if not scales_known:
            scale.copy_(weight.amax(1, keepdim=True) if scale.shape[0] == weight.shape[0] else weight.amax())
        values = statistics.new_statistics()
        values[statistics.COUNT] = weight.numel()
        return TensorStats(values)

    def observe_expert(self, weight: Tensor, amax: Tensor) -> None:
        amax.copy_(torch.maximum(amax, weight.amax().to(amax.dtype)))

    def finish_scales(self, amax: Tensor, scales: Tensors) -> None:
        torch.mul(amax, 10, out=scales[0])

    def setup_kernel(self, layer: nn.Module) -> None:
        with self._lock:
            self.finished.append(layer)


class Layer(nn.Module):
    """What `create_weights` leaves; the weights have closures."""

    weight_layouts: dict[str, WeightLayout]
    w13_weight: Any
    w13_weight_scale: Tensor
    w2_weight: Any
    w2_weight_scale: Tensor


class Experts:
    """A layer as a scheme's `create_weights` leaves it, and its loader."""

    def __init__(self, fmt: WeightFormat = FORMAT, gate_up: tuple[tuple[str, int], ...] | None = None) -> None:
        gate_up = gate_up or (("w1", INTERMEDIATE), ("w3", INTERMEDIATE))
        self.callbacks = FakeCallbacks()
        self.layer = Layer()
        self.layer.weight_layouts = {
            "w13_weight": WeightLayout(fmt, EXPERTS, gate_up, HIDDEN),
            "w2_weight": WeightLayout(fmt, EXPERTS, (("w2", HIDDEN),), INTERMEDIATE),
        }
        for name, layout in self.layer.weight_layouts.items():
            self.layer.register_parameter(name, meta_parameter(layout.shapes[0], torch.uint8))
        self.callbacks.create_scale_tensors(self.layer, EXPERTS)
        self.statistics: list[Tensor] = []
        self.loader = MoeOnlineWeightLoader(
            self.layer, self.callbacks, name="layers.3.experts", on_finished=self.finished
        )
        for name in self.layer.weight_layouts:
            parameter: Any = self.layer.get_parameter(name)
            parameter.weight_loader = self.loader.bound(name)

    def finished(self, values: Tensor, setup_kernel: Callable[[], None]) -> None:
        setup_kernel()
        self.statistics.append(values)

    def give(self, shard: str | None, expert: int, value: Tensor) -> None:
        param = self.layer.w2_weight if shard == "w2" else self.layer.w13_weight
        param.weight_loader(param, value, shard_id=shard, expert_id=expert)

    def check(self, weights: dict[tuple[str, int], Tensor]) -> None:
        for (shard, expert), value in weights.items():
            parameter = self.layer.w2_weight if shard == "w2" else self.layer.w13_weight
            at = INTERMEDIATE if shard == "w3" else 0
            got = parameter[expert, at : at + value.shape[0]]
            assert torch.equal(got.to(value.dtype), value), (shard, expert)


def weights(seed: int = 0) -> dict[tuple[str, int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE), "w3": (INTERMEDIATE, HIDDEN)}
    return {
        (shard, expert): torch.randint(0, 255, shape, generator=generator).to(torch.bfloat16)
        for shard, shape in shapes.items()
        for expert in range(EXPERTS)
    }


def test_the_fake_is_what_the_loader_asks_for() -> None:
    assert isinstance(FakeCallbacks(), MoeQuantizationCallbacks)


@settings(max_examples=25, deadline=None)
@given(st.permutations(sorted(weights())))
def test_any_order_of_arrival_gives_the_same_layer(order: list[tuple[str, int]]) -> None:
    experts, given_weights = Experts(), weights()
    for number, key in enumerate(order):
        assert not experts.callbacks.finished, f"finished after {number} of {len(order)}"
        experts.give(*key, given_weights[key])
    assert experts.callbacks.finished == [experts.layer]
    (stats,) = experts.statistics
    assert stats[statistics.COUNT] == EXPERTS * 3 * INTERMEDIATE * HIDDEN
    experts.check(given_weights)


@pytest.mark.parametrize("seed", range(5))
def test_threads_bring_pieces_of_rows(seed: int) -> None:
    """Every matrix in bands of rows, shuffled over eight threads; the kernel is set up once, by the last one."""
    experts, given_weights = Experts(), weights(seed)
    jobs = []
    for (shard, expert), value in given_weights.items():
        name, at = ("w2_weight", 0) if shard == "w2" else ("w13_weight", INTERMEDIATE if shard == "w3" else 0)
        for low in range(0, value.shape[0], 2):
            part = value[low : low + 2]
            jobs.append((name, part, Region(expert, (at + low, at + low + len(part)), (0, value.shape[1]))))
    random.Random(seed).shuffle(jobs)
    start = threading.Barrier(8)

    def bring(mine: list[Any]) -> None:
        start.wait(10)
        for name, part, region in mine:
            param: Any = experts.layer.get_parameter(name)
            param.weight_loader(param, part, region=region)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(bring, [jobs[i::8] for i in range(8)]))
    assert experts.callbacks.finished == [experts.layer]
    assert experts.statistics[0][statistics.COUNT] == EXPERTS * 3 * INTERMEDIATE * HIDDEN
    experts.check(given_weights)


def test_no_high_precision_expert_is_ever_held() -> None:
    """What the callbacks see is what was handed in, and what the layer holds are codes and scales."""
    experts, given_weights = Experts(), weights()
    for key, value in given_weights.items():
        experts.give(*key, value)
        held = [p for p in experts.layer.parameters() if not p.is_meta]
        assert {p.dtype for p in held} <= {torch.uint8, torch.float32}
    assert experts.callbacks.largest_piece == INTERMEDIATE * HIDDEN
    reachable = [value for value in vars(experts.loader).values() if isinstance(value, Tensor)]
    assert reachable == []


def test_a_checkpoint_that_fuses_gate_and_up_is_cut_between_them() -> None:
    experts, given_weights = Experts(), weights()
    for expert in range(EXPERTS):
        fused = torch.cat([given_weights["w1", expert], given_weights["w3", expert]])
        if expert % 2:
            experts.loader(torch.empty(0), fused, shard_id="w13", expert_id=expert)
        else:
            experts.give(None, expert, fused)
        experts.give("w2", expert, given_weights["w2", expert])
    experts.check(given_weights)
    assert experts.callbacks.largest_piece == INTERMEDIATE * HIDDEN


def test_the_loader_itself_takes_shards_as_vllm_hands_them_over() -> None:
    experts, given_weights = Experts(), weights()
    for (shard, expert), value in given_weights.items():
        experts.loader(torch.empty(0), value, shard_id=shard, expert_id=expert)
    experts.check(given_weights)
    assert len(experts.callbacks.finished) == 1


def test_what_is_missing_has_a_name() -> None:
    experts, given_weights = Experts(), weights()
    for key, value in given_weights.items():
        if key not in (("w3", 2), ("w2", 0)):
            experts.give(*key, value)
    assert not experts.callbacks.finished
    missing = {
        str(region)
        for parameter in experts.loader.progress.parameters.values()
        for region in parameter.tracker.missing()
    }
    assert missing == {
        f"expert 2, rows {INTERMEDIATE}:{2 * INTERMEDIATE}, columns 0:{HIDDEN}",
        f"expert 0, rows 0:{HIDDEN}, columns 0:{INTERMEDIATE}",
    }


def test_a_repeat_is_an_error_before_and_after_the_last_region() -> None:
    experts, given_weights = Experts(), weights()
    first, *rest = given_weights
    experts.give(*first, given_weights[first])
    with pytest.raises(RepeatedRegionError, match=r"layers\.3\.experts\.w13_weight: expert 0, rows 0:6"):
        experts.give(*first, given_weights[first] + 1)
    for key in rest:
        experts.give(*key, given_weights[key])
    with pytest.raises(RepeatedRegionError):
        experts.give(*rest[-1], given_weights[rest[-1]])
    experts.check(given_weights)
    assert len(experts.callbacks.finished) == 1


@pytest.mark.parametrize("through", ["loader", "closure"])
def test_a_reload_goes_through_the_same_closures_into_the_same_memory(through: str) -> None:
    experts = Experts()
    for key, value in weights(1).items():
        experts.give(*key, value)
    where = experts.layer.w13_weight.data_ptr()
    (experts.loader if through == "loader" else experts.layer.w2_weight.weight_loader).reset()
    again = weights(2)
    for number, (key, value) in enumerate(again.items()):
        assert len(experts.callbacks.finished) == 1, number
        experts.give(*key, value)
    assert len(experts.callbacks.finished) == 2
    assert experts.layer.w13_weight.data_ptr() == where
    assert experts.statistics[1][statistics.COUNT] == experts.statistics[0][statistics.COUNT]
    experts.check(again)


def test_a_reload_of_some_parameters_is_complete_without_the_others() -> None:
    experts, first, second = Experts(), weights(1), weights(2)
    for key, value in first.items():
        experts.give(*key, value)
    experts.loader.progress.reset({"w2_weight": Region(1, (0, HIDDEN), (0, INTERMEDIATE))})
    with pytest.raises(RepeatedRegionError):
        experts.give("w2", 0, second["w2", 0])
    experts.give("w2", 1, second["w2", 1])
    assert len(experts.callbacks.finished) == 2
    experts.check({**first, ("w2", 1): second["w2", 1]})


def test_one_scale_an_expert_takes_two_passes() -> None:
    experts, given_weights = Experts(TENSOR), weights()
    closure = experts.layer.w2_weight.weight_loader
    value = given_weights["w2", 1]
    top, bottom = Region(1, (0, 4), (0, INTERMEDIATE)), Region(1, (4, HIDDEN), (0, INTERMEDIATE))
    with pytest.raises(ValueError, match="observe every piece first"):
        closure(experts.layer.w2_weight, value[:4], region=top)
    closure.observe(value[:4], top)
    with pytest.raises(ValueError, match="observe every piece first"):  # half of it has not been seen
        closure(experts.layer.w2_weight, value[:4], region=top)
    closure.observe(value[4:], bottom)
    closure(experts.layer.w2_weight, value[:4], region=top)
    closure(experts.layer.w2_weight, value[4:], region=bottom)
    assert torch.equal(experts.layer.w2_weight_scale[1, 0, 0], 10 * value.amax().float())
    assert torch.equal(experts.layer.w2_weight[1].to(value.dtype), value)


@pytest.mark.parametrize(
    ("shard", "expert", "message"),
    [
        ("w4", 0, "shard_id is 'w4'; choose one of w1, w3, w13, w2"),
        (None, 0, "shard_id is None"),
        ("w1", None, r"layers\.3\.experts\.w13_weight: got expert_id None .* expert_id below 4"),
        ("w2", EXPERTS, r"layers\.3\.experts\.w2_weight: got expert_id 4 .* below 4"),
        ("w2", -1, "got expert_id -1"),
    ],
)
def test_a_shard_that_is_not_there(shard: str | None, expert: int | None, message: str) -> None:
    value = torch.zeros(HIDDEN, INTERMEDIATE) if shard == "w2" else torch.zeros(INTERMEDIATE, HIDDEN)
    with pytest.raises(ShapeMismatchError, match=message):
        Experts().loader(torch.empty(0), value, shard_id=shard, expert_id=expert)


def test_a_closure_refuses_the_shard_of_another_parameter() -> None:
    experts = Experts()
    param = experts.layer.w2_weight
    square = torch.zeros(HIDDEN, INTERMEDIATE, dtype=torch.bfloat16)  # it would fit
    with pytest.raises(ShapeMismatchError, match=r"w2_weight: .*'w1'"):
        param.weight_loader(param, square, shard_id="w1", expert_id=0)


def test_half_of_an_interleaved_pair_is_refused() -> None:
    """Rows of gate and up that take turns have no border between them."""
    experts = Experts(gate_up=(("w13", 2 * INTERMEDIATE),))
    with pytest.raises(ShapeMismatchError):
        experts.give("w1", 0, weights()["w1", 0])


def test_a_nan_is_named_with_its_layer_and_place() -> None:
    experts, value = Experts(), weights()["w1", 0]
    value[2, 5] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=r"layers\.3\.experts\.w13_weight: element \[2, 5\]"):
        experts.give("w1", 0, value)
