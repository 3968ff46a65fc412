"""The quantization methods of vLLM that are ours, by their names.

They are imported in each process of an engine, so that what has to do with layers is imported when the first one is
built (`vllm_methods`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ..errors import PolicyError
from ..options import LoadOptions, QuantizationPolicy
from ..schemes.names import AUTO
from .choices import DECODED, is_stored, read_options, say_decoded
from .names import PREFIX, SCHEMES


class QuantloadConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM's classes are not typed for us
    """One scheme of ours as a quantization method of vLLM; it is pickled on its way to the workers.

    `policy` and `options` come from `quantization_config` in `--hf-overrides`, which has their fields.
    """

    scheme: ClassVar[str]
    name: ClassVar[str]

    def __init__(self, policy: QuantizationPolicy | None = None, options: LoadOptions | None = None) -> None:
        super().__init__()
        self.policy = policy or QuantizationPolicy(self.scheme)
        self.options = options or LoadOptions()
        self.stored: str | None = None
        """The tool that has quantized the checkpoint already."""
        self.weights: Mapping[str, Any] | None = None
        """What a quantized checkpoint stores, by the names there, where the loader has looked."""
        self._rename: Callable[[str], str | None] = str
        self._methods: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_methods": None, "weights": None, "_rename": str}

    def let_stored_go(self) -> None:
        """The model is built: what is known of a quantized checkpoint is large."""
        self.weights = None
        if self._methods is not None:
            self._methods.let_stored_go()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take note of what a model calls the tensors of a checkpoint."""
        self._rename = hf_to_vllm_mapper.map_name

    @classmethod
    def get_name(cls) -> str:
        """The name that `--quantization` takes."""
        return cls.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those that models compute in."""
        return [torch.bfloat16, torch.half, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The kernels say themselves what they can run on."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: a checkpoint that is not quantized has no such file."""
        return []

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> str | None:
        """Our name where it is asked for and the checkpoint is quantized by a tool: it is decoded and quantized anew.

        The config of the model says so from then on, as vLLM's models ask it how their weights are stored. Raises
        `PolicyError` for what is not read here.
        """
        method = hf_quant_cfg.get("quant_method")
        if user_quant != cls.name or method == cls.name:
            return None
        if not is_stored(hf_quant_cfg, cls.name):
            theirs = f"leave the option out, and vLLM loads it as it is ({method})"
            other = "name a checkpoint that is not quantized"
            raise PolicyError(
                f"--quantization {cls.name}: the checkpoint is quantized already, by {method}, which is not read here: "
                f"{theirs if method in QUANTIZATION_METHODS else other}"
            )
        if hf_config is not None:
            say_decoded(hf_config, cls.name, method)
        return cls.name

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantloadConfig:
        """What `--hf-overrides '{"quantization_config": {...}}'` says; `PolicyError` for a field that means nothing."""
        found = cls(*read_options(config, cls.scheme, cls.name, (DECODED,)))
        found.stored = config.get(DECODED)
        return found

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is quantized, or kept; `None` for one that is neither linear nor experts."""
        if self._methods is None:
            from .stored_layers import StoredLayers
            from .vllm_methods import Methods

            layers = None if self.weights is None else StoredLayers(self.weights, self._rename)
            self._methods = Methods(self.policy, self.options, self.packed_modules_mapping, self.stored, layers)
        return self._methods.of(layer, prefix)


def _config_class(scheme: str, name: str) -> type[QuantloadConfig]:
    """The class of a name; pickle finds it as an attribute of this module."""
    attribute = f"Config_{name}"
    found = globals().get(attribute)
    if found is None:
        members = {"scheme": scheme, "name": name, "__module__": __name__, "__doc__": f"`--quantization {name}`."}
        found = globals()[attribute] = type(attribute, (QuantloadConfig,), members)
    return found


CLASSES = {name: _config_class(scheme, name) for scheme in SCHEMES for name in (scheme, f"{PREFIX}{scheme}")}
CLASSES[f"{PREFIX}{AUTO}"] = _config_class(AUTO, f"{PREFIX}{AUTO}")
