"""Portable SIMD for numba kernels: LLVM vector IR, which LLVM lowers to whatever the processor has.

Only operations with one defined result are used for codes and scales (integer arithmetic, IEEE add, multiply,
divide, and fused multiply-add where the processor has one), so the bytes never depend on the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()

ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
"""Bytes per element of each kind of source."""
LINE_BYTES = 64
"""Of a cache."""
INFINITY_BITS = {"bf16": 0x7F80, "f16": 0x7C00, "f32": 0x7F800000}
"""Magnitude bits from which on an element of that kind is infinite or NaN."""
LARGEST_FINITE = {"bf16": 3.4028235e38, "f16": 65504.0, "f32": 3.4028235e38}
"""float32 that every finite element of that kind stays at or below."""


Codegen = Callable[[Any, ir.IRBuilder, Any, Sequence[ir.Value]], ir.Value]
"""What an emitted function returns beside its signature."""


def emitted(function: Callable[..., tuple[Any, Codegen]]) -> Any:
    """Make numba kernels able to call `function`, which gets their literal arguments as literal types."""
    return intrinsic(prefer_literal=True)(function)


class Vector:
    """An LLVM vector value with operators; scalars on the right-hand side become splats."""

    def __init__(self, b: ir.IRBuilder, value: ir.Value) -> None:
        self.b, self.value = b, value

    @property
    def type(self) -> ir.VectorType:
        return self.value.type

    @property
    def is_float(self) -> bool:
        return self.type.element in (F16, F32, F64)

    def like(self, other: Vector | float | int) -> ir.Value:
        if isinstance(other, Vector):
            return other.value
        return ir.Constant(self.type, [other] * self.type.count)

    def new(self, value: ir.Value) -> Vector:
        return Vector(self.b, value)

    def __add__(self, other: Vector | float | int) -> Vector:
        op = self.b.fadd if self.is_float else self.b.add
        return self.new(op(self.value, self.like(other)))

    def __sub__(self, other: Vector | float | int) -> Vector:
        op = self.b.fsub if self.is_float else self.b.sub
        return self.new(op(self.value, self.like(other)))

    def __mul__(self, other: Vector | float | int) -> Vector:
        op = self.b.fmul if self.is_float else self.b.mul
        return self.new(op(self.value, self.like(other)))

    def __truediv__(self, other: Vector | float) -> Vector:
        return self.new(self.b.fdiv(self.value, self.like(other)))

    def __and__(self, other: Vector | int) -> Vector:
        return self.new(self.b.and_(self.value, self.like(other)))

    def __xor__(self, other: Vector | int) -> Vector:
        return self.new(self.b.xor(self.value, self.like(other)))

    def __or__(self, other: Vector | int) -> Vector:
        return self.new(self.b.or_(self.value, self.like(other)))

    def __lshift__(self, other: int) -> Vector:
        return self.new(self.b.shl(self.value, self.like(other)))

    def __rshift__(self, other: Vector | int) -> Vector:
        """Logical shift right."""
        return self.new(self.b.lshr(self.value, self.like(other)))

    def shift_right_signed(self, bits: int) -> Vector:
        """Arithmetic shift right."""
        return self.new(self.b.ashr(self.value, self.like(bits)))

    def gt(self, other: Vector | float | int) -> Vector:
        """Lane mask; unsigned for integers, ordered for floats."""
        if self.is_float:
            return self.new(self.b.fcmp_ordered(">", self.value, self.like(other)))
        return self.new(self.b.icmp_unsigned(">", self.value, self.like(other)))

    def ge(self, other: Vector | int) -> Vector:
        return self.new(self.b.icmp_unsigned(">=", self.value, self.like(other)))

    def eq(self, other: Vector | float | int) -> Vector:
        if self.is_float:
            return self.new(self.b.fcmp_ordered("==", self.value, self.like(other)))
        return self.new(self.b.icmp_unsigned("==", self.value, self.like(other)))

    def select(self, yes: Vector, no: Vector | int) -> Vector:
        """With self a lane mask: `yes` where set, `no` elsewhere."""
        return self.new(self.b.select(self.value, yes.value, yes.like(no)))

    def max(self, other: Vector | float | int) -> Vector:
        return self.gt(other).select(self, self.new(self.like(other)))

    def min(self, other: Vector | float | int) -> Vector:
        return self.gt(other).select(self.new(self.like(other)), self)

    def cast(self, element: ir.Type) -> Vector:
        """Reinterpret the lanes as another element type of the same or of another width."""
        bits = self.type.count * _width(self.type.element)
        return self.new(self.b.bitcast(self.value, ir.VectorType(element, bits // _width(element))))

    def trunc(self, element: ir.Type) -> Vector:
        return self.new(self.b.trunc(self.value, ir.VectorType(element, self.type.count)))

    def zext(self, element: ir.Type) -> Vector:
        return self.new(self.b.zext(self.value, ir.VectorType(element, self.type.count)))

    def sext(self, element: ir.Type) -> Vector:
        return self.new(self.b.sext(self.value, ir.VectorType(element, self.type.count)))

    def to_float(self, element: ir.Type) -> Vector:
        """Signed integers to floats, or floats to wider floats."""
        op = self.b.fpext if self.is_float else self.b.sitofp
        return self.new(op(self.value, ir.VectorType(element, self.type.count)))

    def half(self, high: bool) -> Vector:
        """The lower or upper half of the lanes."""
        n = self.type.count // 2
        return self.shuffle(range(n, 2 * n) if high else range(n))

    def shuffle(self, lanes: Sequence[int], other: Vector | None = None) -> Vector:
        second = ir.Constant(self.type, ir.Undefined) if other is None else other.value
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.new(self.b.shuffle_vector(self.value, second, mask))

    def call(self, name: str, *others: Vector) -> Vector:
        """LLVM intrinsic `name` on vectors of this type."""
        args = [self.value, *(other.value for other in others)]
        full = f"{name}.{_mangled(self.type)}"
        fn = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(self.type, [a.type for a in args]), full)
        return self.new(self.b.call(fn, args))

    def permuted(self, lanes: Vector) -> Vector:
        """Lane i is self[lanes[i] mod 32], for 32 lanes of 16 bits; needs avx512bw."""
        kind = ir.FunctionType(self.type, [self.type, self.type])
        fn = cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.avx512.permvar.hi.512")
        return self.new(self.b.call(fn, [self.value, lanes.value]))

    def permuted_with(self, other: Vector, lanes: Vector) -> Vector:
        """Lane i is lane lanes[i] mod 64 of self and `other` one after the other, 32 lanes of 16 bits; avx512bw."""
        kind = ir.FunctionType(self.type, [self.type] * 3)
        fn = cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.avx512.vpermi2var.hi.512")
        return self.new(self.b.call(fn, [self.value, lanes.value, other.value]))

    def bytes_shuffled(self, lanes: Vector) -> Vector:
        """Lane i is self[lanes[i]], for 16 bytes; for x86 processors with ssse3."""
        kind = ir.FunctionType(self.type, [self.type, self.type])
        fn = cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.ssse3.pshuf.b.128")
        return self.new(self.b.call(fn, [self.value, lanes.value]))

    def bytes_permuted(self, lanes: Vector) -> Vector:
        """Lane i is self[lanes[i] mod 64], for 64 bytes; needs avx512vbmi."""
        kind = ir.FunctionType(self.type, [self.type, self.type])
        fn = cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.avx512.permvar.qi.512")
        return self.new(self.b.call(fn, [self.value, lanes.value]))

    def bytes_permuted_with(self, other: Vector, lanes: Vector) -> Vector:
        """Lane i is lane lanes[i] mod 128 of self and `other` one after the other, 64 bytes each; avx512vbmi."""
        kind = ir.FunctionType(self.type, [self.type] * 3)
        fn = cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.avx512.vpermi2var.qi.512")
        return self.new(self.b.call(fn, [self.value, lanes.value, other.value]))

    def add_byte_products(self, unsigned: Vector, signed: Vector) -> Vector:
        """int32 self[i] + the sum of unsigned[j] * signed[j], j = 4i .. 4i + 3, of 64 bytes each; needs avx512vnni."""
        quads = ir.VectorType(I32, self.type.count)
        kind = ir.FunctionType(self.type, [self.type, quads, quads])
        fn = cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return self.new(self.b.call(fn, [self.value, unsigned.cast(I32).value, signed.cast(I32).value]))

    def add_bf16_products(self, x: Vector, y: Vector) -> Vector:
        """self[i] + x[2i] * y[2i] + x[2i + 1] * y[2i + 1]: float32 sums of BF16 bits; needs avx512bf16.

        The instruction reads subnormal inputs as zero.
        """
        pairs = ir.VectorType(I32, self.type.count)
        kind = ir.FunctionType(self.type, [self.type, pairs, pairs])
        fn = cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return self.new(self.b.call(fn, [self.value, x.cast(I32).value, y.cast(I32).value]))

    def narrowed_with(self, other: Vector) -> Vector:
        """BF16 bits nearest to self and then `other`, ties to even, of 16 float32 each; needs avx512bf16.

        The instruction reads subnormal inputs as zero.
        """
        kind = ir.FunctionType(ir.VectorType(I16, 32), [self.type, self.type])
        fn = cgutils.get_or_insert_function(self.b.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
        return self.new(self.b.call(fn, [other.value, self.value]))

    def minus_saturating(self, other: Vector) -> Vector:
        """max(self - other, 0) on unsigned lanes."""
        return self.call("llvm.usub.sat", other)

    def reduce(self, name: str) -> ir.Value:
        """`llvm.vector.reduce.<name>` to a scalar (umax, add, fmax)."""
        full = f"llvm.vector.reduce.{name}.{_mangled(self.type)}"
        fn = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(self.type.element, [self.type]), full)
        return self.b.call(fn, [self.value])

    def sum(self) -> ir.Value:
        """Sum of float lanes in a fixed order (halves onto halves), the same on every processor."""
        v = self
        while v.type.count > 1:
            v = v.half(False) + v.half(True)
        return self.b.extract_element(v.value, I32(0))


def _width(element: ir.Type) -> int:
    return {F16: 16, F32: 32, F64: 64}.get(element) or int(element.width)


def _mangled(vector: ir.VectorType) -> str:
    prefix = "f" if vector.element in (F16, F32, F64) else "i"
    return f"v{vector.count}{prefix}{_width(vector.element)}"


def constant(b: ir.IRBuilder, element: ir.Type, lanes: int, value: float | int) -> Vector:
    """A vector with the same constant in every lane."""
    return Vector(b, ir.Constant(ir.VectorType(element, lanes), [value] * lanes))


def splat(b: ir.IRBuilder, scalar: ir.Value, lanes: int) -> Vector:
    """A vector with the same run-time value in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, I32(0))
    return Vector(b, b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)))


def fused(a: Vector, x: Vector, y: Vector) -> Vector:
    """a * x + y with one rounding; for processors with `fma`, elsewhere it would be a library call a lane."""
    return a.call("llvm.fma", x, y)


def accumulate_product(a: Vector, x: Vector, y: Vector) -> Vector:
    """a * x + y, fused or not as the processor likes: for statistics only."""
    return a.call("llvm.fmuladd", x, y)


def load(b: ir.IRBuilder, address: ir.Value, element: ir.Type, lanes: int) -> Vector:
    """`lanes` elements from an integer address without alignment."""
    pointer = b.inttoptr(address, ir.VectorType(element, lanes).as_pointer())
    return Vector(b, b.load(pointer, align=1))


def store(value: Vector, address: ir.Value) -> None:
    """All lanes to an integer address without alignment."""
    b = value.b
    b.store(value.value, b.inttoptr(address, value.type.as_pointer()), align=1)


def load_scalar(b: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    return b.load(b.inttoptr(address, element.as_pointer()), align=1)


def nearest_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The bits of the BF16 nearest to a float32, ties to even."""
    bits = b.bitcast(value, I32)
    odd = b.and_(b.lshr(bits, I32(16)), I32(1))
    rounded = b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16))
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.select(is_nan, I32(0x7FC0), rounded), I16)


def prefetch(b: ir.IRBuilder, base: ir.Value, step: ir.Value, step_bytes: int) -> None:
    """Ask for the cache lines in which the bytes of a step begin; `base` is where those of step 0 lie."""
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    fn = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0i8")
    first = b.add(base, b.mul(step, I64(step_bytes)))
    for line in range(-(-step_bytes // LINE_BYTES)):
        b.call(fn, [b.inttoptr(b.add(first, I64(LINE_BYTES * line)), pointer), I32(0), I32(3), I32(1)])


def store_scalar(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


class Accumulators:
    """Named vectors that live across the iterations of emitted loops (allocas that LLVM turns into registers)."""

    def __init__(self, b: ir.IRBuilder) -> None:
        self.b = b
        self.slots: dict[str, ir.Value] = {}

    def start(self, name: str, initial: Vector) -> None:
        slot = cgutils.alloca_once(self.b, initial.type)
        self.b.store(initial.value, slot)
        self.slots[name] = slot

    def get(self, name: str) -> Vector:
        return Vector(self.b, self.b.load(self.slots[name]))

    def set(self, name: str, value: Vector) -> None:
        self.b.store(value.value, self.slots[name])

    def update(self, name: str, change: Callable[[Vector], Vector]) -> None:
        self.set(name, change(self.get(name)))


@contextmanager
def count_to(b: ir.IRBuilder, stop: ir.Value) -> Iterator[ir.Value]:
    """A loop over i64 0 .. stop - 1."""
    with cgutils.for_range(b, stop, intp=I64) as loop:
        yield loop.index


def magnitudes(bits: Vector, kind: str) -> Vector:
    """Source bits without their sign."""
    return bits & (0x7FFFFFFF if kind == "f32" else 0x7FFF)


def source_element(kind: str) -> ir.Type:
    return I32 if kind == "f32" else I16


def widen(magnitude: Vector, kind: str) -> Vector:
    """float32 lanes from magnitude bits that were zero-extended to 32 bits; exact, f16 subnormals included."""
    if kind == "bf16":
        return (magnitude << 16).cast(F32)
    if kind == "f16":
        return (magnitude << 13).cast(F32) * 2.0**112
    return magnitude.cast(F32)


def float32_bits(b: ir.IRBuilder, magnitude: ir.Value, kind: str) -> ir.Value:
    """The i32 bits of the float32 that i32 magnitude bits of a kind of source stand for."""
    return b.extract_element(widen(splat(b, magnitude, 1), kind).cast(I32).value, I32(0))
