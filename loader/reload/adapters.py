"""LoRA adapters that are added to weights on their way: `W + B @ A * alpha / r`, piece by piece."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..checkpoint.small_files import read_json_object
from ..errors import CheckpointError, PolicyError, ShapeMismatchError, UnsupportedCheckpointError
from ..geometry.regions import Interval, Region
from ..model.attach import WeightLoaders
from ..model.leftovers import some
from ..model.routes import Routes
from ..online.sink import InPlace
from ..online.weight_loader import DirectWeightLoader, OnlineWeightLoader
from ..ranks.alone import Alone

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:(?:\.[^.]+)?\.weight)?")
_REFUSED = (
    *("use_dora", "use_bdlora", "use_qalora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "lora_bias", "modules_to_save", "target_parameters", "megatron_config"),
    *("trainable_token_indices", "layer_replication"),
)
"""Fields of PEFT's config with which an adapter is more, or something else, than B @ A times a scale."""
_OTHER_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` with which PEFT changes the weights that the adapter is added to."""
_ALPHA = 8.0
"""What PEFT takes where a config has no `lora_alpha`."""


@dataclass(frozen=True)
class LoraAdapter:
    """Pairs of matrices, A [r, K] and B [N, r], by the module or weight that `B @ A` times a scale is added to.

    Names are those of the model or of its checkpoint, without `.weight`.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], alpha: float, *, rslora: bool = False) -> Self:
        """Of tensors called `<module>.lora_A.weight` and `<module>.lora_B.weight`, as PEFT calls them.

        The scale is alpha / r, with `rslora` alpha / sqrt(r). Raises `PolicyError` for other names and for A without B.
        """
        halves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            found = _NAME.fullmatch(name)
            if found is None:
                raise PolicyError(
                    f"{name} is no matrix of a LoRA adapter; they are called <module>.lora_A.weight, and B"
                )
            halves.setdefault(found[1], {})[found[2]] = tensor
        alone = [name for name, pair in halves.items() if len(pair) == 1]
        if alone:
            raise PolicyError(f"of LoRA pairs only one matrix is given: {some(alone)}")
        pairs = {name: (pair["A"].detach().float(), pair["B"].detach().float()) for name, pair in halves.items()}
        for name, (a, b) in pairs.items():
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ShapeMismatchError(
                    f"{name}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, no [r, K] and [N, r]"
                )
        scales = {name: alpha / (a.shape[0] ** 0.5 if rslora else a.shape[0]) for name, (a, _) in pairs.items()}
        return cls(pairs, scales)

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Of a folder that PEFT saved; raises `UnsupportedCheckpointError` for what is more than pairs of matrices."""
        root = Path(folder).expanduser()
        config = read_json_object(root / CONFIG)
        if config is None or not (root / WEIGHTS).is_file():
            raise CheckpointError(
                f"{root} has no {CONFIG} and {WEIGHTS}; give the folder of an adapter that PEFT saved"
            )
        more = [name for name in _REFUSED if config.get(name)]
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or more:
            said = ", ".join(more) or f"peft_type {config.get('peft_type')!r}, bias {config.get('bias')!r}"
            raise UnsupportedCheckpointError(
                f"{root / CONFIG}: {said}; only plain LoRA can be added to weights on their way"
            )
        begun = config.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(_OTHER_BASE):
            raise UnsupportedCheckpointError(
                f"{root / CONFIG}: init_lora_weights is {begun!r}, with which an adapter is trained on changed weights "
                f"and does not fit those of the checkpoint; save it with path_initial_model_for_weight_conversion, or "
                f"merge it with PEFT"
            )
        with safe_open(root / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        one = cls.of(tensors, 1.0, rslora=bool(config.get("use_rslora")))
        return cls(one.pairs, {name: scale * _alpha_of(name, config) for name, scale in one.scales.items()})


def _alpha_of(name: str, config: Mapping[str, Any]) -> float:
    """The alpha of a module: that of the first pattern that fits the end of its name, as in PEFT, or that of all."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(alpha)
    return float(config.get("lora_alpha", _ALPHA))


def check_undivided(adapter: object, ranks: Alone) -> None:
    """Raise `PolicyError` where an adapter is to be added to a model that ranks divide."""
    if adapter is not None and ranks.ranks > 1:
        raise PolicyError(
            f"an adapter is added to weights in one process, and this model is divided among {ranks.ranks}: reload it "
            f"from weights that have the adapter in them"
        )


Index = tuple[slice, slice]


@dataclass(frozen=True)
class _Addition:
    """`b` [rows, r] times `a` [r, columns], to be added to a region."""

    region: Region
    a: Tensor
    b: Tensor

    def within(self, expert: int | None, rows: Interval, columns: Interval) -> tuple[Index, Tensor] | None:
        """What is added to some rows and columns of a matrix, and where there."""
        own = self.region
        low, high = max(rows[0], own.rows[0]), min(rows[1], own.rows[1])
        left, right = max(columns[0], own.columns[0]), min(columns[1], own.columns[1])
        if expert != own.expert or low >= high or left >= right:
            return None
        b, a = self.b[low - own.rows[0] : high - own.rows[0]], self.a[:, left - own.columns[0] : right - own.columns[0]]
        place = slice(low - rows[0], high - rows[0]), slice(left - columns[0], right - columns[0])
        return place, b @ a


class _Merging:
    """What closures that add to weights have in common; values are rounded to the dtype that they came in."""

    additions: Sequence[_Addition]

    def merged(self, weight: Tensor, expert: int | None, rows: Interval, columns: Interval) -> Tensor:
        """A piece and what is to be added to it."""
        found = [each.within(expert, rows, columns) for each in self.additions]
        if not any(found):
            return weight
        sum_ = weight.float().clone()
        for index, addition in filter(None, found):
            sum_[index] += addition.to(sum_.device)
        return sum_.to(weight.dtype)


class _MergingOnline(_Merging, OnlineWeightLoader):
    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        super().load_region(self.merged(loaded_weight, *region), region)

    def load_experts(self, weights: Tensor, experts: Sequence[int | None], rows: Interval, columns: Interval) -> None:
        merged = [self.merged(weight, expert, rows, columns) for weight, expert in zip(weights, experts, strict=True)]
        super().load_experts(torch.stack(merged), experts, rows, columns)

    def observe(self, loaded_weight: Tensor, region: Region) -> None:
        super().observe(self.merged(loaded_weight, *region), region)


class _MergingDirect(_Merging, DirectWeightLoader):
    def load_region(self, loaded_weight: Tensor, region: Region) -> None:
        super().load_region(self.merged(loaded_weight, *region), region)

    def in_place(self, dtype: torch.dtype, region: Region) -> InPlace | None:
        return None


def merge_adapter(adapter: LoraAdapter, loaders: WeightLoaders, routes: Routes, tied: Mapping[str, str]) -> set[str]:
    """Have the closures of a draft add an adapter to what comes; returns the parameters that are changed.

    Raises `PolicyError` for a pair whose module the model does not have, or whose weight is shared or stays as it is
    stored, and `ShapeMismatchError` for matrices of other sizes.
    """
    additions: dict[str, list[_Addition]] = {}
    for name, (a, b) in adapter.pairs.items():
        parameter, region = _place(name, loaders, routes)
        turned = _is_turned(loaders.sinks[parameter])
        left, right = (a.T, b.T) if turned else (b, a)
        shape = [region.rows[1] - region.rows[0], region.columns[1] - region.columns[0]]
        if [left.shape[0], right.shape[1]] != shape:
            weight = shape[::-1] if turned else shape
            raise ShapeMismatchError(f"{name}: B @ A is {[b.shape[0], a.shape[1]]}, and the weight {weight}")
        additions.setdefault(parameter, []).append(_Addition(region, right, left * adapter.scales[name]))
    shared = [name for name in additions if name in tied or name in tied.values()]
    if shared:
        raise PolicyError(f"an adapter changes weights that are tied to others: {some(shared)}")
    for parameter, own in additions.items():
        loaders.sinks[parameter] = _merging(loaders.sinks[parameter], own)
    return set(additions)


def _place(name: str, loaders: WeightLoaders, routes: Routes) -> tuple[str, Region]:
    """Parameter and region that the weight of a module fills, as the closure there counts rows and columns."""
    weight = name if name.endswith(".weight") else f"{name}.weight"
    if weight in loaders.sinks and loaders.landing(weight).experts is None:
        landing = loaders.landing(weight)
        return weight, Region(None, (0, landing.rows), (0, landing.columns))
    spans = routes.spans.get(weight, [])
    if len(spans) != 1 or spans[0].column_stride != 1:
        raise PolicyError(f"the model has no weight that the LoRA pair {name} could be added to")
    return spans[0].parameter, spans[0].region


def _is_turned(sink: object) -> bool:
    """Whether a closure writes a weight as its module has it, and that is [K, N]; those that quantize have [N, K]."""
    return isinstance(sink, DirectWeightLoader) and isinstance(sink.module, Conv1D)


def _merging(sink: Any, additions: Sequence[_Addition]) -> Any:
    """The same closure, which adds."""
    kinds: dict[type, Any] = {OnlineWeightLoader: _MergingOnline, DirectWeightLoader: _MergingDirect}
    kind = kinds.get(type(sink))
    if kind is None:
        raise PolicyError(f"{sink.name} stays as its checkpoint stores it; a LoRA pair is added to values only")
    merging = kind.__new__(kind)
    merging.__dict__.update(sink.__dict__)
    merging.additions = additions
    return merging
