"""Products of a few tokens with weights that are no codes, on a CPU: each weight is read once, in the order it lies in.

torch has them, too; what it takes for a single token is no faster than its caches allow. Products of the weight with
more tokens are torch's.
"""

from __future__ import annotations

from array import array
from functools import cache

import torch

from . import team
from .build import linear as linear_build
from .compiled import CFunction, Needed
from .dequantize import ALONE_ELEMENTS
from .few_tokens import ROW_STEP
from .ir.decoders import BLOCK
from .operations import KINDS
from .processor import has

MOST_TOKENS = 4
"""Whose products are made in float32; of more of them torch's are faster."""
MOST_PAIRED = 8
"""Tokens in BF16 that a processor multiplies pairs of, up to which it waits for the weight more than it computes."""


def serves(weight: torch.Tensor) -> bool:
    """Whether a weight is one that `linear` reads: of its dtypes, [N, K] of whole blocks, without gaps."""
    in_rows = weight.dim() == 2 and weight.shape[1] % BLOCK == 0 and weight.numel() > 0 and weight.is_contiguous()
    return in_rows and has_values(weight.dtype)


@cache
def has_values(dtype: torch.dtype) -> bool:
    """Whether weights of a dtype become float32 by instructions of this processor."""
    return dtype in KINDS and (dtype != torch.float16 or has("f16c"))


@cache
def most_tokens(dtype: torch.dtype) -> int:
    """Tokens of a dtype that `linear` takes."""
    pairs = dtype == torch.bfloat16 and has("avx512bw") and has("avx512bf16")
    return MOST_PAIRED if pairs else MOST_TOKENS


def needed(dtype: torch.dtype, tokens: int) -> Needed[CFunction]:
    """The compiled task that multiplies up to `tokens` tokens of `dtype` with weights of that dtype."""
    paired = "_bf16" if tokens > MOST_TOKENS else ""
    return linear_build.dot_task.needed(f"plain_{KINDS[dtype]}{paired}", _slots(tokens))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] times the transposed weight [N, K], plus bias [N]: [T, N]; all in one dtype, T at most `most_tokens`.

    Products and sums are float32, rounded once, with the bias added. `serves` says for which weights. The instruction
    that multiplies pairs, for more than `MOST_TOKENS` tokens, reads subnormal numbers as zero; torch uses it, too.
    """
    (tokens, k), n_rows = x.shape, weight.shape[0]
    slots = _slots(tokens)
    wide = x if tokens > MOST_TOKENS else x.to(torch.float32)
    if slots != tokens:
        wide = torch.cat([wide, wide.new_zeros(slots - tokens, k)])
    wide = wide.contiguous()
    narrow = x.dtype == torch.bfloat16 and bias is None
    out = torch.empty(slots, n_rows, dtype=torch.bfloat16 if narrow else torch.float32)
    threads = torch.get_num_threads() if n_rows * k >= ALONE_ELEMENTS else 1
    step = max(1, n_rows // (8 * threads * ROW_STEP)) * ROW_STEP
    of_weight = weight.data_ptr(), k * weight.element_size(), _scale_of_one().buffer_info()[0]
    of_out = out.data_ptr(), n_rows * out.element_size()
    rest = k, wide.data_ptr(), wide.element_size() * k, 0, 0, 0, 0, int(narrow), 0, 0
    arguments = array("q", (0, n_rows, step, *of_weight, *of_out, *rest))
    team.run(needed(x.dtype, tokens).get(), arguments.buffer_info()[0], threads)
    out = out[:tokens]
    return (out if bias is None else out.add_(bias)).to(x.dtype)


@cache
def _scale_of_one() -> array[int]:
    """`linear_build.SCALE_ARGUMENTS` of a scale of 1 that all rows have."""
    return array("q", (_ONE.buffer_info()[0], 0, 1 << 62, 1 << 62))


_ONE = array("f", [1.0])


def _slots(tokens: int) -> int:
    """Tokens a compiled kernel takes: the next power of two."""
    return 1 << (tokens - 1).bit_length()
