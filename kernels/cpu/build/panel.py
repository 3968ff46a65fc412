"""Compile the matmul of many tokens: each thread dequantizes rows into its own cache and multiplies them there."""

from __future__ import annotations

from ..compiled import FINGERPRINT, CFunction, Compiled, Recipe, c_function
from ..ir.panel import BLOCK, ROWS, TOKENS, add_products
from .linear import TASK, argument, call_dequantize, take

CHUNK = 2048
"""Columns that are multiplied at a time: those of `TOKENS` tokens fill half a first-level cache."""
PAD = 64
"""Bytes between the rows of a panel, so that the same columns of all rows do not meet in one set of a cache."""


def _panel_task() -> Recipe[CFunction]:
    """out[t][row] for all rows and tokens, both filled up to whole `ROWS` and `TOKENS`; x is [chunks, tokens, CHUNK].

    A panel, `step` rows, is dequantized before all tokens meet it; each thread has memory of its own for that.
    """
    fingerprint, row_step, token_step, chunk, block, pad = FINGERPRINT, ROWS, TOKENS, CHUNK, BLOCK, PAD

    def task(data: int) -> None:
        len(fingerprint)
        rows, step, cols = argument(data, 1), argument(data, 2), argument(data, 8)
        codes, codes_stride, scales = argument(data, 3), argument(data, 4), argument(data, 5)
        out, out_stride, function = argument(data, 6), argument(data, 7), argument(data, 11)
        x, tokens, stride = argument(data, 9), argument(data, 12), 2 * cols + pad
        panel = argument(data, 13) + take(data + 8 * 14, 1) * step * stride
        start = take(data, step)
        while start < rows:
            height = min(step, rows - start)
            c = codes + start * codes_stride
            call_dequantize(function, c, codes_stride, scales, panel, stride, start, height, cols)
            for k in range(0, cols, chunk):
                blocks, first = min(chunk, cols - k) // block, int(k == 0)
                for t in range(0, tokens, token_step):
                    here = x + 2 * (k * tokens + t * chunk)
                    for r in range(0, height, row_step):
                        w, o = panel + r * stride + 2 * k, out + t * out_stride + 4 * (start + r)
                        add_products(w, stride, here, 2 * chunk, blocks, o, out_stride, first)
            start = take(data, step)

    return c_function(task, TASK)


panel_task = Compiled(_panel_task)
