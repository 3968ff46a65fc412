"""Stream a high-precision checkpoint straight into a quantized model, in bounded memory."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .convert.flow import convert_checkpoint
    from .engines.transformers import QuantloadConfig
    from .errors import QuantloadError
    from .load import load_quantized
    from .memory.report import LoadReport
    from .options import LoadOptions, QuantizationPolicy
    from .planning import plan_quantized
    from .quantized_model import QuantizedModel
    from .reload.flow import reload_weights

    __version__: str

__all__ = [
    "LoadOptions", "LoadReport", "QuantizationPolicy", "QuantizedModel", "QuantloadConfig", "QuantloadError",
    "convert_checkpoint", "load_quantized", "plan_quantized", "reload_weights",
]  # fmt: skip

# Resolved on first use: the pytest plugin and the log parser live in this package and must not import torch.
_HOMES = {
    "LoadOptions": ".options",
    "LoadReport": ".memory.report",
    "QuantizationPolicy": ".options",
    "QuantizedModel": ".quantized_model",
    "QuantloadError": ".errors",
    "convert_checkpoint": ".convert.flow",
    "QuantloadConfig": ".engines.transformers",
    "load_quantized": ".load",
    "plan_quantized": ".planning",
    "reload_weights": ".reload.flow",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return metadata.version(__name__)
    if name in _HOMES:
        from .collector import collector_paused

        with collector_paused():  # it would look at all that torch and transformers make, again and again
            module = import_module(_HOMES[name], __name__)
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
