"""What a model remembers of its load, so that new weights can be loaded as the first were."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..checkpoint.headers import TensorEntry
from ..options import LoadOptions, QuantizationPolicy
from ..ranks.alone import ALONE, Alone

_Kind = tuple[torch.dtype, tuple[int, ...]]


class TensorNames:
    """Names, dtypes and shapes of checkpoint tensors, packed: a few bytes of each are kept.

    Names of a checkpoint differ in a number or a word; whole, they would take some hundred bytes each.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        kinds: dict[_Kind, int] = {}
        names: list[str] = []
        numbers = array("I")
        for name, dtype, shape in tensors:
            names.append(name)
            numbers.append(kinds.setdefault((dtype, tuple(shape)), len(kinds)))
        self._count = len(names)
        self._names = zlib.compress("\0".join(names).encode(), level=1)
        self._numbers = zlib.compress(numbers.tobytes(), level=1)
        self._kinds = tuple(kinds)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes that names and numbers take, packed."""
        return len(self._names) + len(self._numbers)

    def __iter__(self) -> Iterator[TensorEntry]:
        """Entries that lie in no file."""
        if not self._count:
            return
        numbers = array("I", zlib.decompress(self._numbers))
        for name, number in zip(zlib.decompress(self._names).decode().split("\0"), numbers, strict=True):
            dtype, shape = self._kinds[number]
            nbytes = dtype.itemsize
            for extent in shape:
                nbytes *= extent
            yield TensorEntry(name, dtype, shape, 0, 0, nbytes)


@dataclass(frozen=True)
class LoadSettings:
    """How a model was loaded: `policy` is what `quantization` and `policy` of the load came to.

    `tensors` are those of its checkpoint that went into parameters, with the dtype their values had, `unused` the
    names of the others. `is_kept_as_stored`: it has weights in the form in which a quantized checkpoint stores them.
    """

    policy: QuantizationPolicy
    options: LoadOptions
    trust_remote_code: bool
    tensors: TensorNames
    unused: TensorNames
    is_kept_as_stored: bool
    ranks: Alone = ALONE
    """Those that the model is divided among, as a reload asks them."""
