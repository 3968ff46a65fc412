"""The product of one quantized weight with a few tokens, on a CPU: weights are decoded in registers.

A model that generates calls hundreds of layers for each token, most of which compute for some tens of microseconds. So
what is the same in every call is computed once, when a `FewTokens` is made; it may be kept as long as the tensors of
the weight stay where they are.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from functools import cache

import torch

from ..formats import Tensors, WeightFormat
from . import team
from .build import linear as linear_build
from .compiled import CFunction, Needed
from .dequantize import ALONE_ELEMENTS, address, scale_arguments
from .ir.decoders import BLOCK, DECODERS, order_of
from .ir.vector import LINE_BYTES
from .processor import has

ROW_STEP = 8
"""Threads take rows in multiples of it: of the rows that are worked on together, inside blocks of rows."""
_X, _OUT, _OUT_STRIDE, _NARROW, _ROW_SCALES = map(
    linear_build.ARGUMENTS.index, ("x", "out", "out_stride", "narrow", "row_scales")
)
NO_SCALES = 0, 0
_reused = threading.local()
Run = Callable[[int], object]


class FewTokens:
    """`linear` of one weight with up to `linear_build.most_tokens()` tokens of one dtype."""

    def __init__(self, fmt: WeightFormat, tensors: Tensors, n_rows: int, k: int, dtype: torch.dtype) -> None:
        self.dtype, self.columns, self.most = dtype, k, linear_build.most_tokens()
        self._format, self._rows = fmt, n_rows
        self._decoder = decoder_of(fmt, dtype)
        self._takes_as_it_is = self._decoder.endswith("_bf16") and k % BLOCK == 0
        self._row_scales = _row_scales(fmt, tensors)
        self._unscaled = 2 if self._row_scales == NO_SCALES else 3  # the first tensor that the kernel does not apply
        self._narrows = dtype == torch.bfloat16 and len(tensors) <= self._unscaled
        self._of_weight = address(tensors[0])
        self._scales = scale_arguments(fmt, tensors, n_rows, k)
        order = order_of(self._decoder)
        self._arranges = None if order is None else _arrange(order)
        self._alone = n_rows * k < ALONE_ELEMENTS
        self._calls: dict[tuple[int, int], tuple[Run, array[int]]] = {}

    def __call__(
        self, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """x [T, K] or [..., T, K] times the transposed weight, plus bias: `shape` [..., T, N], contiguous.

        `tensors` are those that the weight was given as, in the places where they were then.
        """
        if not x.is_cpu:
            address(x)  # says what to do about it
        tokens = x.numel() // self.columns
        key = tokens, 1 if self._alone else torch.get_num_threads()
        run, kept = self._calls.get(key) or self._prepared(*key)
        arguments = kept[:]  # each call has its own: threads may be in the same layer at once
        slots = _slots(tokens)
        if not self._takes_as_it_is or slots != tokens or not x.is_contiguous():
            x = _activations(x.reshape(tokens, self.columns), slots, self._decoder)
        arguments[_X] = x.data_ptr() if self._arranges is None else self._arranged(x, slots)
        if self._narrows and bias is None and slots == tokens:
            out = torch.empty(shape, dtype=self.dtype)
            arguments[_OUT], arguments[_OUT_STRIDE], arguments[_NARROW] = out.data_ptr(), 2 * self._rows, 1
            run(arguments.buffer_info()[0])
            return out
        sums = torch.empty(slots, self._rows, dtype=torch.float32)
        arguments[_OUT] = sums.data_ptr()
        run(arguments.buffer_info()[0])
        return finished(sums[:tokens], tensors[self._unscaled :], bias).to(self.dtype).view(shape)

    def _arranged(self, x: torch.Tensor, slots: int) -> int:
        """Where activations stand in the order of `ir.wide`, in memory that this thread uses for the next, too."""
        assert self._arranges is not None
        blocks = -(-self.columns // BLOCK)
        place = _place(slots * blocks * 2 * BLOCK)
        self._arranges(x.data_ptr(), place, slots, blocks)
        return place

    def _prepared(self, tokens: int, threads: int) -> tuple[Run, array[int]]:
        """What runs so many tokens on so many threads, and its arguments as far as they are the same in all calls."""
        cols = -(-self.columns // BLOCK) * BLOCK
        step = max(1, self._rows // (8 * threads * ROW_STEP)) * ROW_STEP
        x_stride = cols * (2 if self._decoder.endswith("_bf16") else 4)
        of_weight = *self._of_weight, self._scales.buffer_info()[0]
        values = [0, self._rows, step, *of_weight, 0, 4 * self._rows, cols, 0, x_stride]
        values += [0] * (_ROW_SCALES - len(values))
        task = linear_build.dot_task.needed(self._decoder, _slots(tokens)).get()
        made = team.runner(task, threads), array("q", (*values, *self._row_scales))
        self._calls[tokens, threads] = made
        return made


def _place(nbytes: int) -> int:
    """The address of so many bytes that this thread reuses, where a line of the cache begins.

    Vectors as long as a line would else be read from two lines each.
    """
    found: tuple[int, int, array[int]] | None = _reused.__dict__.get("activations")
    if found is None or found[1] < nbytes:
        memory = array("q", bytes(-(-nbytes // 8) * 8 + LINE_BYTES))
        start = memory.buffer_info()[0]
        found = _reused.activations = start + -start % LINE_BYTES, nbytes, memory
    return found[0]


@cache
def _arrange(order: str) -> Callable[..., int]:
    return linear_build.arrange_activations(order).ctypes


def needed(fmt: WeightFormat, dtype: torch.dtype, tokens: int) -> Needed[CFunction]:
    """The compiled task that multiplies up to `tokens` tokens of `dtype`."""
    return linear_build.dot_task.needed(decoder_of(fmt, dtype), _slots(tokens))


def needed_besides(fmt: WeightFormat, dtype: torch.dtype) -> list[Needed[CFunction]]:
    """What any number of tokens up to a few calls besides."""
    order = order_of(decoder_of(fmt, dtype))
    return [] if order is None else [linear_build.arrange_activations.needed(order)]


def decoder_of(fmt: WeightFormat, dtype: torch.dtype) -> str:
    """The best of `ir.decoders.DECODERS` for this processor."""
    kind = fmt.decoder
    if dtype == torch.bfloat16 and has("avx512bw") and has("avx512bf16"):
        others = f"{kind}_quads_bf16", *([f"{kind}_vbmi_bf16"] if has("avx512vbmi") else [])
        return next((name for name in others if _suits(name, fmt)), f"{kind}_bf16")
    return f"{kind}_f16c" if has("f16c") and f"{kind}_f16c" in DECODERS else f"{kind}_f32"


def _suits(name: str, fmt: WeightFormat) -> bool:
    """Whether there is a decoder of that name, and segments of the format are whole numbers of what it takes."""
    decoder = DECODERS.get(name)
    if decoder is None:
        return False
    return bool(decoder.block_scales) or decoder.wide is None or fmt.block_cols % (BLOCK * decoder.wide.blocks) == 0


def _row_scales(fmt: WeightFormat, tensors: Tensors) -> tuple[int, int]:
    """`row_scales` and their stride in `linear_build.ARGUMENTS`: the scale of all rows, or one for each of them."""
    if len(tensors) < 3 or fmt.scales[1].block_rows > 1 or tensors[2].dtype != torch.float32:
        return NO_SCALES
    place, stride = address(tensors[2])
    return place, stride * fmt.scales[1].block_rows


def finished(product: torch.Tensor, scales: Tensors, bias: torch.Tensor | None) -> torch.Tensor:
    """float32 sums of codes times their scales, times further `scales` of the tensor or of its rows, plus bias."""
    for scale_2 in scales:
        product *= scale_2.view(-1)
    return product if bias is None else product.add_(bias)


def _activations(x: torch.Tensor, slots: int, decoder: str) -> torch.Tensor:
    """`x` as the kernel reads it: [slots, K'] with rows of zeros for the slots that no token has, K' whole blocks."""
    tokens, k = x.shape
    cols = -(-k // BLOCK) * BLOCK
    dtype = torch.bfloat16 if decoder.endswith("_bf16") else torch.float32
    if (tokens, k) != (slots, cols):
        padded = x.new_zeros(slots, cols, dtype=dtype)
        padded[:tokens, :k] = x
        x = padded
    if DECODERS[decoder].even_first:
        x = x.view(slots, cols // BLOCK, BLOCK // 2, 2).transpose(2, 3).reshape(slots, cols)
    return x.to(dtype).contiguous()


@cache
def _slots(tokens: int) -> int:
    """Tokens a compiled kernel takes: the next power of two."""
    return 1 << (tokens - 1).bit_length()
