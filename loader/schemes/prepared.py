"""The product of a quantized layer with a few tokens, prepared: checked once, then called until something has changed.

For one token a layer computes for some tens of microseconds, and Python takes as long to check the same shapes again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.formats import Tensors
from ..kernels.registry import Prepared
from .opaque import plain


class PreparedProduct:
    """What a layer keeps: the prepared `linear` of its weight, and what that weight was.

    It keeps no tensor alive, and stays behind when a layer is copied or pickled, as it is made of addresses.
    """

    def __init__(
        self, run: Prepared | None, dtype: torch.dtype, names: Sequence[str], tensors: Tensors, rows: int
    ) -> None:
        self._run, self._dtype, self._rows = run, dtype, rows
        self._columns = 1 if run is None else run.columns
        self._most = 0 if run is None else run.most * run.columns
        self._tensors = [(name, weakref.ref(each), each.data_ptr()) for name, each in zip(names, tensors, strict=True)]

    def is_for(self, dtype: torch.dtype, held: Mapping[str, Any]) -> bool:
        """Whether it was made for activations of that dtype, and the parameters of the layer are the same ones."""
        return dtype is self._dtype and self._unchanged(held) is not None

    def __call__(self, x: Tensor, held: Mapping[str, Any], bias: Tensor | None) -> Tensor | None:
        """x [..., K] times the weight, plus bias: [..., N]; None where that is not prepared."""
        shape, run = x.shape, self._run
        if run is None or not 0 < x.numel() <= self._most or shape[-1] != self._columns or x.dtype is not self._dtype:
            return None
        tensors = self._unchanged(held)
        return None if tensors is None else run(x, tensors, bias, (*shape[:-1], self._rows))

    def _unchanged(self, held: Mapping[str, Any]) -> Tensors | None:
        """The tensors of the layer, if they are those of the beginning, in their places."""
        found = []
        for name, reference, place in self._tensors:
            tensor = plain(held[name])
            if reference() is not tensor or tensor.data_ptr() != place:
                return None
            found.append(tensor)
        return tuple(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


def _nothing() -> None:
    return None
