"""What vLLM and SGLang ask of the quantization method of a linear layer, in the same words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.stored_sources import ModuleWeights
from ..online.storage import FinalStorage
from ..schemes.linear import QuantizedLinearScheme
from .closures import EngineLayer, quantized_linear
from .rank_maxima import Division, RankMaxima


class LinearMethod:
    """A linear layer of an engine, merged or cut among ranks as it may be, in a scheme of ours.

    `maxima` are those of the ranks that the engine divides it among; `None` where there is one, or no group of them.
    With `stored` it stays as the checkpoint has it.
    """

    layer: EngineLayer

    def __init__(
        self,
        storage: FinalStorage,
        scheme: QuantizedLinearScheme,
        prefix: str,
        maxima: RankMaxima | None,
        stored: ModuleWeights | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self._storage, self._prefix, self._maxima = scheme, storage, prefix, maxima
        self._stored = stored

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Codes and scales of this rank's part; each part of a merged layer is a shard."""
        base = extra_weight_attrs.pop("weight_loader")
        rows, columns = sum(output_partition_sizes) != output_size, input_size_per_partition != input_size
        self.layer = quantized_linear(
            layer,
            self._prefix,
            self.scheme,
            tuple((str(number), rows) for number, rows in enumerate(output_partition_sizes)),
            input_size_per_partition,
            self._storage,
            base,
            params_dtype,
            {"output_dim": 0, "input_dim": 1, **extra_weight_attrs},
            Division(self._maxima, rows=rows, columns=columns),
            self._stored,
        )
        self._stored = None

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., K] times the weight, plus bias."""
        return self.scheme.apply(layer, x, bias)
