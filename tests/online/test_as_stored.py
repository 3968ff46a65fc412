"""The closures of weights that stay as stored, called as a server would call them: shard by shard, in any order."""

from __future__ import annotations

import copy

import pytest
import torch
from quantload.errors import NonFiniteWeightError, RepeatedRegionError, RouteError, ShapeMismatchError
from quantload.geometry.layout import WeightLayout
from quantload.geometry.regions import Region
from quantload.kernels.formats import FORMATS
from quantload.online.as_stored import InputScaleLoader, StoredParameter, StoredProgress
from quantload.online.parameter import materialized_in
from quantload.online.storage import FinalStorage
from quantload.schemes.activations import InputScales
from quantload.schemes.base import meta_parameter
from quantload.schemes.stored.weights import Role
from torch import nn

N, K, E = 4, 64, 2


class UsedMemory(FinalStorage):
    """Memory that is not zero, as that of a GPU."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = super().empty(shape, dtype)
        tensor.view(torch.uint8).fill_(0xA5)
        return tensor


class Layer(nn.Module):
    """Gate and up of experts."""

    w13: torch.Tensor
    w13_scale: torch.Tensor


class World:
    """A layer of two experts, gate and up, and the closures on its parameters."""

    def __init__(
        self, name: str, has_zero_points: bool = True, zero_point: float = 0.0, multiples: tuple[int, int] = (1, 1)
    ) -> None:
        fmt = FORMATS[name]
        layout = WeightLayout(fmt, E, (("w1", N), ("w3", N)), K, multiples)
        self.layer = Layer()
        self.layer.register_parameter("w13", meta_parameter(layout.shapes[0], fmt.code_dtype))
        self.layer.register_parameter("w13_scale", meta_parameter(layout.shapes[1], fmt.scale_dtype))
        storage = UsedMemory(torch.device("cpu"))
        self.parameter = materialized_in(self.layer, "w13", "experts.w13", layout, storage)
        largest = 2.0**125 if fmt.scale_dtype == torch.uint8 else 100.0
        self.stored = StoredParameter(self.parameter, has_zero_points, zero_point, largest)
        self.finished = 0
        self.progress = StoredProgress([self.stored], self.finish)
        self.loaders = self.stored.loaders

    def finish(self) -> None:
        self.finished += 1

    def give(self, role: Role, value: torch.Tensor, expert: int, shard: str) -> None:
        self.loaders[role](self.layer.w13, value, expert_id=expert, shard_id=shard)


def test_shards_of_experts_arrive_in_any_order_and_the_layer_finishes_once() -> None:
    world = World("mxfp4")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (E, 2 * N, K // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (E, 2 * N, K // 32), dtype=torch.uint8, generator=generator)
    tensors: dict[Role, torch.Tensor] = {"scale": scales, "codes": codes}
    for role, tensor in tensors.items():
        for expert in (1, 0):
            assert world.finished == 0
            world.give(role, tensor[expert, N:], expert, "w3")
            world.give(role, tensor[expert, :N], expert, "w1")
    assert world.finished == 1
    assert torch.equal(world.layer.w13, codes)
    assert torch.equal(world.layer.w13_scale, scales)
    assert list(world.loaders["codes"].missing()) == []


@pytest.mark.parametrize("multiple", [32, 64, 128, 256])
def test_codes_of_a_padded_parameter_stand_between_zeros(multiple: int) -> None:
    """They do not lie in one piece there, so that nothing may be read straight into it."""
    world, plain = World("mxfp4", multiples=(multiple, multiple)), World("mxfp4")
    whole = Region(0, (0, N), (0, K))
    assert plain.loaders["codes"].in_place(torch.uint8, whole) is not None
    assert (world.loaders["codes"].in_place(torch.uint8, whole) is None) == world.parameter.layout.is_padded
    generator = torch.Generator().manual_seed(0)
    for expert in range(E):
        for shard in ("w1", "w3"):
            world.give(
                "codes", torch.randint(1, 256, (N, K // 2), dtype=torch.uint8, generator=generator), expert, shard
            )
            world.give(
                "scale", torch.randint(1, 255, (N, K // 32), dtype=torch.uint8, generator=generator), expert, shard
            )
    rows, columns = -(-N // multiple) * multiple, -(-K // multiple) * multiple
    assert (world.layer.w13.shape, world.layer.w13_scale.shape) == (
        (E, 2 * rows, columns // 2),
        (E, 2 * rows, columns // 32),
    )
    for tensor, width in ((world.layer.w13, K // 2), (world.layer.w13_scale, K // 32)):
        assert (tensor.unflatten(1, (2, rows))[:, :, :N, :width] != 0).all()
        assert int((tensor != 0).sum()) == E * 2 * N * width


def test_zero_points_stand_beside_the_scales_or_are_filled_in() -> None:
    for has_zero_points in (True, False):
        world = World("int4_group32_f32", has_zero_points, zero_point=8.0)
        assert ("zero_point" in world.loaders) == has_zero_points
        scales, zeros = torch.rand(N, 2), torch.randint(16, (N, 2)).float()
        world.give("scale", scales, 0, "w1")
        if has_zero_points:
            world.give("zero_point", zeros, 0, "w1")
        assert torch.equal(world.layer.w13_scale[0, :N, 0::2], scales)
        assert torch.equal(world.layer.w13_scale[0, :N, 1::2], zeros if has_zero_points else torch.full((N, 2), 8.0))


def test_what_is_missing_is_named_codes_and_scales() -> None:
    world = World("fp8_channel")
    world.give("codes", torch.zeros(N, K).to(torch.float8_e4m3fn), 0, "w1")
    missing = list(world.loaders["codes"].missing())
    assert missing == [
        f"experts.w13 expert 0, rows {N}:{2 * N}, columns 0:{K}",
        f"experts.w13 expert 1, rows 0:{2 * N}, columns 0:{K}",
        f"experts.w13 scale expert 0, rows 0:{2 * N}, columns 0:{K}",
        f"experts.w13 scale expert 1, rows 0:{2 * N}, columns 0:{K}",
    ]


def test_a_repeat_is_an_error_until_a_reload_is_announced() -> None:
    world = World("mxfp4")
    codes = torch.zeros(N, K // 2, dtype=torch.uint8)
    world.give("codes", codes, 0, "w1")
    with pytest.raises(RepeatedRegionError, match=r"experts\.w13: expert 0, rows 0:4"):
        world.give("codes", codes, 0, "w1")
    world.loaders["scale"].reset()
    world.give("codes", codes + 1, 0, "w1")
    assert (world.layer.w13[0, :N] == 1).all()


@pytest.mark.parametrize(
    ("name", "scale"),
    [("mxfp4", torch.full((N, 2), 255, dtype=torch.uint8)), ("fp8_channel", torch.full((N, 1), torch.inf))],
)
def test_scales_that_are_not_finite_are_refused(name: str, scale: torch.Tensor) -> None:
    with pytest.raises(NonFiniteWeightError, match=r"experts\.w13 scale of expert 0: a scale is NaN or infinite"):
        World(name).give("scale", scale, 0, "w1")


@pytest.mark.parametrize("name", ["fp8_channel", "int8_channel"])
def test_scales_that_make_codes_infinite_are_refused(name: str) -> None:
    world = World(name)
    world.give("scale", torch.full((N, 1), -100.0), 0, "w1")
    with pytest.raises(NonFiniteWeightError, match=r"experts\.w13 scale of expert 0: a scale is 100\.5; .* above 100 "):
        world.give("scale", torch.full((N, 1), -100.5), 0, "w3")


def test_zero_points_are_no_scales() -> None:
    world = World("int4_group32_f32")
    world.give("zero_point", torch.full((N, 2), 101.0), 0, "w1")
    with pytest.raises(NonFiniteWeightError, match="NaN or infinite"):
        world.give("zero_point", torch.full((N, 2), torch.nan), 0, "w3")


def test_wrong_shapes_dtypes_and_places_are_refused() -> None:
    world = World("mxfp4")
    codes = torch.zeros(N, K // 2, dtype=torch.uint8)
    with pytest.raises(ShapeMismatchError, match=r"got torch\.uint8 of shape \(3, 32\), torch\.uint8 of"):
        world.give("codes", codes[:3], 0, "w1")
    world = World("mxfp4")
    with pytest.raises(ShapeMismatchError, match=r"got torch\.int8"):
        world.give("codes", codes.view(torch.int8), 0, "w1")
    with pytest.raises(ShapeMismatchError, match="reaches over a shard"):
        world.loaders["codes"](world.layer.w13, codes, region=Region(0, (2, 6), (0, K)))
    with pytest.raises(ShapeMismatchError, match="cuts through scale blocks"):
        world.loaders["scale"](world.layer.w13, torch.zeros(N, 1, dtype=torch.uint8), region=Region(0, (0, N), (0, 16)))
    with pytest.raises(ShapeMismatchError, match="no shard 'w2'"):
        world.give("codes", codes, 0, "w2")


def test_the_largest_input_scale_is_written_when_all_have_come() -> None:
    world = World("mxfp4")
    written: list[torch.Tensor] = []
    loader = InputScaleLoader(world.parameter, "experts.w13_input_scale", 3, InputScales(), written.append)
    loader.progress = world.progress
    for shard, value in (("w1", 0.5), ("w3", 2.0)):
        loader(world.layer.w13, torch.tensor(value, dtype=torch.bfloat16), expert_id=0, shard_id=shard)
    assert written == []
    assert list(loader.gaps()) == ["experts.w13_input_scale, of which 2 of 3 scales came"]
    loader(world.layer.w13, torch.tensor([1.0]), expert_id=1, shard_id="w1")
    assert [value.tolist() for value in written] == [[2.0]]
    assert list(loader.gaps()) == []


def test_the_input_scale_of_a_weight_comes_once_until_a_reload_is_announced() -> None:
    world = World("mxfp4")
    written: list[torch.Tensor] = []
    loader = InputScaleLoader(world.parameter, "experts.w13_input_scale", 2, InputScales(), written.append)
    loader.progress = world.progress
    loader(world.layer.w13, torch.tensor(0.5), expert_id=0, shard_id="w1")
    with pytest.raises(RepeatedRegionError, match=r"^experts\.w13_input_scale: expert 0, rows 0:4"):
        loader(world.layer.w13, torch.tensor(0.5), expert_id=0, shard_id="w1")
    assert written == []
    loader.forget()
    for expert in range(2):
        loader(world.layer.w13, torch.tensor(0.25), expert_id=expert, shard_id="w1")
    assert [value.tolist() for value in written] == [[0.25]]


def test_a_copy_of_the_closures_says_that_it_is_one() -> None:
    world = World("mxfp4")
    detached = copy.deepcopy(world.loaders["codes"])
    with pytest.raises(RouteError, match=r"experts\.w13 belongs to a copy"):
        detached(world.layer.w13, torch.zeros(N, K // 2, dtype=torch.uint8), expert_id=0, shard_id="w1")
