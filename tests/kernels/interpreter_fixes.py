"""What Triton's interpreter gets wrong about BF16 and E4M3 FNUZ, put right for tests that run under it.

It takes every scale of `tl.dot_scaled` for E8M0. It multiplies the bits of BF16 operands of `tl.dot` instead of their
values, makes BF16 of an integer likewise, cuts off where it should round, and loses subnormals. The conversions here
are torch's. Up to Triton 3.7 it does not know E4M3 FNUZ by its name, although it has all that it takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_patch_lang_core = interpreter._patch_lang_core
_scale: Any = getattr(interpreter, "_dot_scaled_scale_to_f32", None)
_create_dot = interpreter.InterpreterBuilder.create_dot


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if source == tl.bfloat16:
        wide = _widen(data)
        return wide.view(np.uint32) if target == tl.float32 else _convert(wide, tl.float32, target, rounding)
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(data.view(np.float32))).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)
    converted: np.ndarray = _convert(data, source, target, rounding)
    return converted


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    wide = [interpreter.TensorHandle(_widen(t.data), tl.float32) if t.dtype == tl.bfloat16 else t for t in (a, b)]
    return _create_dot(self, *wide, d, input_precision, max_num_imprecise_acc)


def _integer_to_float(self: Any, source: Any, target: Any) -> Any:
    if target.scalar == tl.bfloat16:
        return self.cast_impl(self.cast_impl(source, tl.float32), target)
    return self.cast_impl(source, target)


def _with_fnuz(lang: Any, *scope: Any) -> None:
    """The language as the interpreter patches it for the time it runs a kernel; it undoes all of it afterwards."""
    _patch_lang_core(lang, *scope)
    to_ir = lang.dtype.to_ir
    lang.dtype.to_ir = lambda self, b: b.get_fp8e4b8_ty() if self.name == "fp8e4b8" else to_ir(self, b)


def _scale_to_f32(scale: Any, *where: Any) -> np.ndarray:
    if scale.dtype == tl.float8e4nv:
        return torch.from_numpy(np.ascontiguousarray(scale.data)).view(torch.float8_e4m3fn).float().numpy()
    converted: np.ndarray = _scale(scale, *where)
    return converted


def apply() -> None:
    """Patch the interpreter of this process."""
    if _scale is not None:
        interpreter._dot_scaled_scale_to_f32 = _scale_to_f32
    interpreter._convert_float = _convert_float
    interpreter._patch_lang_core = _with_fnuz
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpreterBuilder.create_si_to_fp = _integer_to_float
