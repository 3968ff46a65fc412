"""`from_pretrained(..., quantization_config=QuantloadConfig("quark_mxfp4"))`: transformers' own way in.

transformers builds the model on meta and asks a quantizer to prepare it for its weights. Ours loads them there and
then, as `load_quantized` does, and leaves transformers a checkpoint without a tensor; what it does after that
(generation config, adapters, kernels) stays its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.folder import Checkpoint, shard_names
from ..checkpoint.headers import TensorEntry
from ..errors import PolicyError, UnsupportedCheckpointError
from ..load import load_into
from ..model import transformers_api
from ..model.building import Recipe
from ..model.leftovers import some
from ..model.meaning import can_be_read, meaning
from ..model.quantized import quantized_modules
from ..model.routes import CheckpointMap
from ..options import LoadOptions, QuantizationPolicy
from ..progress import Progress
from ..schemes.names import SchemeName, known_name
from ..schemes.registry import choose_device
from ..schemes.stored.quantload import METHOD

SAVED = ("format_version", "formats", "shapes", "transposed")
"""What a saved folder says in its config about codes and scales: see `schemes.stored.quantload`."""


class QuantloadConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers' classes are not typed
    """How transformers' `from_pretrained` is to quantize with quantload while it loads.

    `scheme`, `policy`, `options` and `progress` are those of `load_quantized`; `policy` may be given by its fields
    (`ignore=...`, `experts=...`), `options` as a mapping. What a load found is written to `config.json` by
    `save_pretrained`, and read back by `from_pretrained` and `load_quantized`. Raises `PolicyError` for what no load
    would take.
    """

    def __init__(
        self,
        scheme: SchemeName | str = "auto",
        *,
        policy: QuantizationPolicy | None = None,
        options: LoadOptions | Mapping[str, Any] | None = None,
        progress: Progress | bool | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = METHOD
        others.pop("quant_method", None)
        self.saved: dict[str, Any] = {name: others.pop(name) for name in SAVED if name in others}
        if policy is not None and others:
            raise PolicyError(f"policy is given, and {', '.join(sorted(others))} beside it: give one of them")
        self.policy = policy or QuantizationPolicy.from_mapping({"linear": scheme, **others})
        self.scheme = self.policy.linear if policy is not None and scheme == "auto" else known_name(scheme)
        self.options = options if isinstance(options, LoadOptions) else LoadOptions.from_mapping(options or {})
        self.progress = progress

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` says: the policy, and once weights are loaded, what their codes and scales mean."""
        return {"quant_method": METHOD, **(self.saved or {"scheme": self.scheme, **self._asked()})}

    def _asked(self) -> dict[str, Any]:
        """The fields of the policy that are not the usual ones."""
        given = {each.name: getattr(self.policy, each.name) for each in fields(self.policy) if each.name != "linear"}
        return {name: value for name, value in given.items() if value != getattr(QuantizationPolicy(), name)}

    def __repr__(self) -> str:
        asked = "".join(f", {name}={value!r}" for name, value in self._asked().items())
        loaded = f", {len(self.saved['formats'])} weights loaded" if self.saved else ""
        return f"QuantloadConfig({self.scheme!r}{asked}{loaded})"


class QuantloadQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls with a model on meta and the files of its checkpoint."""

    requires_calibration = False
    quantization_config: QuantloadConfig
    _device: torch.device

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Raise `PolicyError` for a model on several devices."""
        self._device = _one_device(device_map)

    def update_device_map(self, device_map: Any) -> dict[str, Any] | None:
        """All of the model on one device."""
        return None if device_map is None else {"": self._device}

    def is_serializable(self) -> bool:
        """Codes and scales are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Only adapters beside the weights are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The kernels are operators of torch."""
        return True

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Nothing is to be allocated ahead: all weights have their memory."""
        return 0

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        checkpoint = _checkpoint(model, checkpoint_files)
        config = self.quantization_config
        building = _Given(model, dtype or torch.get_default_dtype())
        with transformers_api.outside_of_building():
            load_into(
                building,
                checkpoint,
                "auto" if self.pre_quantized else config.scheme,
                device=self._device,
                policy=None if self.pre_quantized else config.policy,
                options=config.options,
                revision=None,
                trust_remote_code=model.is_custom_code(),
                progress=config.progress,
            )
        assert checkpoint_files is not None
        transformers_api.load_nothing_more(model, checkpoint_files, building.unexpected)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        transformers_api.save_under_own_names(model)
        model.config.quantization_config.saved = meaning(quantized_modules(model))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The state dict for `save_pretrained`; `UnsupportedCheckpointError` where the config could not say it all."""
        state = dict(model.state_dict())
        for name, module in quantized_modules(model):
            if module.scheme.activation is not None:
                raise UnsupportedCheckpointError(
                    f"{name} rounds its activations to {module.scheme.activation.format}, which no saved config says; "
                    f"load with activations='none' to save, or use quantload.convert_checkpoint"
                )
            for key, layout in module.scheme.layouts(module).items():
                if not can_be_read(layout):
                    raise UnsupportedCheckpointError(
                        f"{name}.{key} is in {layout.format.name}, with scales that quantload cannot read back from a "
                        f"saved folder; use quantload.convert_checkpoint, or load with another scheme to save"
                    )
                names = layout.format.names(f"{name}.{key}")
                state |= zip(names, module.scheme.canonical(module, key), strict=True)
        return state, {}


def _one_device(device_map: Any) -> torch.device:
    """The device that a `device_map` puts everything on; a strategy such as "auto" is the first device with kernels."""
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, str):
        return choose_device("auto")
    places = {str(torch.device(place)) for place in device_map.values() if place != "disk"}
    if len(places) != 1 or "disk" in device_map.values():
        named = ", ".join(sorted({str(place) for place in device_map.values()}))
        raise PolicyError(f"device_map has {named}; quantload puts a model on one device: give its name, or 'auto'")
    return choose_device(places.pop())


def _checkpoint(model: Any, files: list[str] | None) -> Checkpoint:
    """The folder that transformers found the checkpoint in; the files it is about to load are those of its index."""
    name = str(model.config.name_or_path)
    if not files or any(not file.endswith(".safetensors") for file in files):
        found = ", ".join(sorted({Path(file).name for file in files or ()})) or "a state dict"
        raise UnsupportedCheckpointError(
            f"{name}: transformers is loading {found}; quantload streams from safetensors files: save the model with "
            f"save_pretrained, which writes them"
        )
    folders = {Path(file).parent for file in files}
    root = folders.pop()
    if folders or {Path(file).name for file in files} != {*shard_names(root)}:
        raise UnsupportedCheckpointError(
            f"{name}: transformers is loading {some(Path(file).name for file in files)}, and the index of {root} names "
            f"others; quantload loads the checkpoint that the index names, without `variant` or extra files"
        )
    return Checkpoint(root.resolve(), name)


@dataclass
class _Given:
    """The model that transformers built, filled by us and completed by transformers."""

    model: Any
    dtype: torch.dtype
    is_used: bool = False
    unexpected: tuple[str, ...] = ()

    def find(self, checkpoint: Checkpoint, trust_remote_code: bool, tensors: Mapping[str, TensorEntry]) -> Recipe:
        """The model itself; where a load begins anew, emptied again."""
        if self.is_used:
            transformers_api.build_again(self.model, self.dtype)
        self.is_used = True
        return self

    def build(self, tensors: Iterable[TensorEntry]) -> tuple[PreTrainedModel, torch.dtype]:
        """See `Recipe.build`."""
        return self.model, self.dtype

    def finish(self, model: Any, mapped: CheckpointMap, device: torch.device) -> Mapping[str, str]:
        """See `transformers_api.finish`; what transformers does afterwards finds nothing left to do."""
        self.unexpected = mapped.leftovers.unexpected
        return transformers_api.finish(model, mapped.missing, mapped.weight_conversions, device)


def register() -> None:
    """Let transformers know `QuantloadConfig`, in arguments and in the `config.json` of saved folders."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(QuantloadConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(QuantloadQuantizer)


register()
