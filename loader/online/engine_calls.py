"""The ways in which vLLM and SGLang call a `weight_loader`, brought to one.

Their models' `load_weights` call `weight_loader(param, loaded_weight)`, and further

- `(param, loaded_weight, shard_id)` for a linear layer that merges several: `"q"`, `"k"`, `"v"`, the number of a part
  (0 gate, 1 up), or a tuple of numbers for parts that are one tensor in the checkpoint;
- `(param, loaded_weight, weight_name, shard_id=..., expert_id=..., return_success=True)` for experts, all of it by
  position too: `"w1"` gate, `"w2"` down, `"w3"` up.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from ..errors import ShapeMismatchError
from ..geometry.layout import ShardId

NOT_GIVEN: Final[Any] = object()
"""The default of what may be given as None."""


class Shard(NamedTuple):
    """What a call is about."""

    shard_id: ShardId
    expert_id: int | None
    return_success: bool


def shard_of(
    name: str,
    positional: tuple[Any, ...],
    weight_name: str | None,
    shard_id: ShardId,
    loaded_shard_id: ShardId,
    expert_id: int | None,
    return_success: bool,
) -> Shard:
    """What is meant by arguments behind the tensor, those without a keyword in `positional`.

    The first of those is a shard id where it is the only word about shards, else the name of the weight. Raises
    `ShapeMismatchError`, calling the parameter `name`, for an argument that is given twice, or one too many.
    """
    if loaded_shard_id is not NOT_GIVEN:
        shard_id = _once(name, "shard_id", shard_id, loaded_shard_id)
    if len(positional) == 1 and shard_id is NOT_GIVEN and expert_id is NOT_GIVEN and weight_name is None:
        shard_id = positional[0]
    elif positional:
        rest = positional if weight_name is not None else positional[1:]
        if len(rest) > 3:
            raise ShapeMismatchError(f"{name}: a weight_loader takes no {len(positional) + 2} arguments by position")
        shard_id = _once(name, "shard_id", shard_id, *rest[:1])
        expert_id = _once(name, "expert_id", expert_id, *rest[1:2])
        return_success = return_success or bool(rest[2:] and rest[2])
    return Shard(
        None if shard_id is NOT_GIVEN else shard_id, None if expert_id is NOT_GIVEN else expert_id, return_success
    )


def _once(name: str, argument: str, by_keyword: Any, *by_position: Any) -> Any:
    if by_position and by_keyword is not NOT_GIVEN:
        raise ShapeMismatchError(f"{name}: {argument} is given twice, {by_keyword!r} and {by_position[0]!r}")
    return by_position[0] if by_position else by_keyword
