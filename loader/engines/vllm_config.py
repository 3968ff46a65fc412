"""The quantization methods of vLLM that are ours, by their names.

They are imported in each process of an engine, so that what has to do with layers is imported when the first one is
built (`vllm_methods`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ..options import LoadOptions, QuantizationPolicy
from .choices import read_options
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
        self._methods: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_methods": None}

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
    def from_config(cls, config: Mapping[str, Any]) -> QuantloadConfig:
        """What `--hf-overrides '{"quantization_config": {...}}'` says; `PolicyError` for a field that means nothing."""
        return cls(*read_options(config, cls.scheme, cls.name))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is quantized, or kept; `None` for one that is neither linear nor experts."""
        if self._methods is None:
            from .vllm_methods import Methods

            self._methods = Methods(self.policy, self.options, self.packed_modules_mapping)
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
