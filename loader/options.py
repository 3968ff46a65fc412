"""What a user can choose about a load: frozen dataclasses whose unknown keys raise."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar, get_args, overload

from .errors import PolicyError
from .kernels.system_calls import SHARES_LOCKS
from .local_paths import local_path
from .memory.amounts import parse_bytes
from .schemes.names import known_name
from .threads import usable_cores

MIB = 1 << 20
MOST_CONNECTIONS = 256

PageCache = Literal["auto", "keep", "drop"]
CacheVerify = Literal["samples", "full"]
MemoryScope = Literal["rank", "host"]
ScaleMode = Literal["default", "mse"]
Activations = Literal["auto", "none", "emulate", "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8", "fp8", "int8"]


_SizeT = TypeVar("_SizeT", int, "int | None")


class Size(Generic[_SizeT]):
    """A field of a dataclass that is a number of bytes; text such as `16GiB` is taken, too, and becomes one."""

    def __init__(self, default: _SizeT) -> None:
        self._default: _SizeT = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, options: None, owner: type) -> _SizeT: ...
    @overload
    def __get__(self, options: object, owner: type) -> _SizeT: ...
    def __get__(self, options: object | None, owner: type) -> _SizeT:
        size: _SizeT = self._default if options is None else options.__dict__[self._name]
        return size

    def __set__(self, options: object, size: _SizeT | str) -> None:
        options.__dict__[self._name] = _in_bytes(self._name, size)


class SizeOrAuto:
    """A field of a dataclass that is a number of bytes, `auto` or None; text such as `16GiB` becomes a number."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, options: None, owner: type) -> None: ...
    @overload
    def __get__(self, options: object, owner: type) -> int | Literal["auto"] | None: ...
    def __get__(self, options: object | None, owner: type) -> int | Literal["auto"] | None:
        size: int | Literal["auto"] | None = None if options is None else options.__dict__[self._name]
        return size

    def __set__(self, options: object, size: int | str | None) -> None:
        options.__dict__[self._name] = size if size == "auto" else _in_bytes(self._name, size)


def _in_bytes(name: str, size: Any) -> Any:
    """A size that a field was given, as a number of bytes where it is text."""
    if not isinstance(size, str):
        return size
    try:
        return parse_bytes(size)
    except PolicyError as error:
        raise PolicyError(f"{name}: {error}") from None


def _from_mapping(cls: type[Any], values: Mapping[str, Any]) -> Any:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise PolicyError(
            f"{cls.__name__} does not know {', '.join(map(repr, unknown))}; it knows {', '.join(sorted(known))}"
        )
    return cls(**values)


def _said(options: Any) -> str:
    """A call that makes equal options, of what is not the default."""
    said = (f.name for f in fields(options) if getattr(options, f.name) != getattr(type(options)(), f.name))
    return f"{type(options).__name__}({', '.join(f'{name}={getattr(options, name)!r}' for name in said)})"


@dataclass(frozen=True, repr=False)
class LoadOptions:
    """How a load runs; nothing here but `fit` changes the bytes of the quantized weights.

    Sizes are numbers of bytes, or text with a unit, such as "16GiB" or "500MB". Raises `PolicyError` for values that
    are out of range or of another type.
    """

    chunk_bytes: Size[int] = Size(8 * MIB)
    """Largest piece that is read and quantized at once, in bytes; at least 4096. A scale block is never cut, so a piece
    is larger where a block is."""

    staging_bytes: Size[int | None] = Size(None)
    """Size of the staging arena, the buffers that pieces are read into, in bytes. None: what the workers need, which is
    two buffers of the largest piece each (on a GPU, and in a conversion, three). Less means fewer workers, more is not
    taken."""

    max_memory: Size[int | None] = Size(None)
    """Limit in bytes for the predicted peak of a load: model, staging arena and allowance. A load that would take more
    ends with `MemoryBudgetError` before a weight is read. None: no limit."""

    memory_scope: MemoryScope = "rank"
    """What `max_memory` is the limit of, where several processes hold a model together: each of them, or all that run
    on one host."""

    fit: SizeOrAuto = SizeOrAuto()
    """Choose the schemes that lose least with a peak of at most so many bytes, instead of a quantization: what is
    smallest where little fits, as stored where all does. `auto`: what the machine, or the device, has free, less a
    reserve and an attention cache. Of a conversion it is the size of the files of weights. None: nothing is chosen."""

    fit_context: int | None = None
    """Tokens of a sequence that `fit="auto"` leaves room for in the attention cache. None: the context of the model, at
    most 8192."""

    fit_requests: int | None = None
    """How many such sequences `fit="auto"` leaves room for. None: one."""

    fit_head: bool = False
    """Let `fit` choose schemes for the output head and the embedding, too, which are left as stored otherwise. For
    loads that stay here: engines take no quantized head, and no other tool reads a quantized embedding."""

    fit_sensitivity: Mapping[str, float] = field(default_factory=dict)
    """How much the output feels kinds of modules by depth, for `fit`, as
    `quantload.fit.sensitivity.measure_sensitivity` measures it; others are as on the demo model."""

    force: bool = False
    """Load although the memory that is available is too little for the model. `max_memory` still counts."""

    workers: int | None = None
    """Threads that read and quantize. None: one for each core the process may use."""

    page_cache: PageCache = "auto"
    """What becomes of the checkpoint's files in the page cache: `auto` leaves what was there before the load and drops
    the rest behind the reader, `keep` drops nothing, `drop` everything."""

    stats: bool = True
    """Measure in the kernels what quantizing loses (SQNR, largest error, saturation); loads without it are faster, and
    do not see where a weight becomes infinite in a model that computes in float16."""

    digest: bool = False
    """Compute a digest of the final tensors (`load_report.digest`), equal for every load that ends in the same names,
    dtypes, shapes and bytes, whatever the order, the kernels and the machine. It reads all of the model once more."""

    strict: bool = False
    """Whether what is a warning otherwise is an error: a pattern of the policy that matches no module
    (`UnmatchedPatternError`), a scheme, pattern or option that changes nothing (`UnappliedOptionError`), checkpoint
    tensors that no parameter takes (`UnexpectedWeightsError`), a tensor that lies in two shards, tied parameters that
    are stored with different values (`CheckpointError`), NaN or infinities in a weight that is kept as stored
    (`NonFiniteWeightError`; one that is quantized must have none at all)."""

    activations: Activations = "auto"
    """What the inputs of quantized layers are rounded to. `auto`: what the chosen kernel does; `none`: never rounded;
    `emulate`: rounded and back, to what the checkpoint's config says, else to the scheme's own format. The name of a
    format (`mxfp4`, `fp8`, ...): to that one, in a kernel where there is one for it, else emulated."""

    retries: int | None = None
    """How often a read that failed with an error that may pass is tried again without a byte in between; 0 or more.
    None: 4 times for files (EIO, ESTALE, ETIMEDOUT, EINTR), 10 times for what is read from a server."""

    connections: int | None = None
    """Requests that are in flight at once where the checkpoint is read from a server; 1 or more. None: 8."""

    kernels: Mapping[str, str] = field(default_factory=dict)
    """Kernels chosen by hand: operation (`quantize`, `linear`, ...) to kernel name (`triton`, `numba`, `torch`, ...).
    What is not named here gets the first kernel that can run."""

    cache: str | Path | None = None
    """Folder in which a load leaves the quantized form, for the next load of the same to read. None: no cache."""

    cache_bytes: Size[int | None] = Size(None)
    """Largest size of that folder in bytes; entries that were not used for longest are removed. None: what the disk
    has."""

    cache_verify: CacheVerify = "samples"
    """How a cache entry knows the checkpoint's weights. `samples`: by headers, sizes and times of change of the files,
    and 64 pages of 4 KiB from each. `full`: by every byte, so that each load reads the whole checkpoint for it."""

    def __post_init__(self) -> None:
        self._check_types()
        if self.chunk_bytes < 4096:
            raise PolicyError(f"chunk_bytes is {self.chunk_bytes}; give at least 4096")
        if self.workers is not None and self.workers < 1:
            raise PolicyError(f"workers is {self.workers}; give at least 1, or None for one a core")
        if self.page_cache not in ("auto", "keep", "drop"):
            raise PolicyError(f"page_cache is {self.page_cache!r}; choose auto, keep or drop")
        if self.memory_scope not in get_args(MemoryScope):
            raise PolicyError(f"memory_scope is {self.memory_scope!r}; choose rank or host")
        if self.cache_verify not in get_args(CacheVerify):
            raise PolicyError(f"cache_verify is {self.cache_verify!r}; choose {' or '.join(get_args(CacheVerify))}")
        if self.activations not in get_args(Activations):
            raise PolicyError(f"activations is {self.activations!r}; choose one of {', '.join(get_args(Activations))}")
        if self.retries is not None and self.retries < 0:
            raise PolicyError(f"retries is {self.retries}; give 0 or more")
        if self.connections is not None and not 1 <= self.connections <= MOST_CONNECTIONS:
            raise PolicyError(f"connections is {self.connections}; give 1 to {MOST_CONNECTIONS}, or None for 8")
        for name in ("fit_context", "fit_requests"):
            value = getattr(self, name)
            if value is not None and (value < 1 or self.fit != "auto"):
                raise PolicyError(f"{name} is {value}; give 1 or more, and fit='auto', which it is for")
        for name in ("staging_bytes", "max_memory", "cache_bytes", "fit"):
            value = getattr(self, name)
            if value is not None and value != "auto" and value <= 0:
                raise PolicyError(f"{name} is {value}; give a positive number of bytes")

    def _check_types(self) -> None:
        whole = ("chunk_bytes", "retries", "staging_bytes", "max_memory", "workers", "cache_bytes", "connections")
        for name in (*whole, "fit_context", "fit_requests", *(("fit",) if self.fit != "auto" else ())):
            value = getattr(self, name)
            may_be_none = name != "chunk_bytes"
            if not (isinstance(value, int) and not isinstance(value, bool)) and not (value is None and may_be_none):
                raise PolicyError(f"{name} is {value!r}; give a whole number")
        for name in ("stats", "digest", "strict", "force", "fit_head"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name} is {getattr(self, name)!r}; give True or False")
        if self.cache is not None and (not isinstance(self.cache, (str, Path)) or not str(self.cache)):
            raise PolicyError(f"cache is {self.cache!r}; give the path of a folder")
        if self.cache is not None:
            local_path(self.cache, "cache", PolicyError, may_fail=True)
        if self.cache is not None and not SHARES_LOCKS:
            raise PolicyError(
                "cache: this system has no locks that several processes hold together (flock), which keep an entry in "
                "its place while it is read; load without a cache"
            )
        if not isinstance(self.fit_sensitivity, Mapping) or not all(
            isinstance(value, int | float) and 0 <= value < float("inf") for value in self.fit_sensitivity.values()
        ):
            raise PolicyError(f"fit_sensitivity is {self.fit_sensitivity!r}; give what was measured, numbers by name")
        if self.fit_head and self.fit is None:
            raise PolicyError("fit_head says what fit is to choose for: give a size, too")
        if self.fit_sensitivity and self.fit is None:
            raise PolicyError("fit_sensitivity says what fit is to choose by: give a size, too")
        if not isinstance(self.kernels, Mapping):
            raise PolicyError(f"kernels is {self.kernels!r}; give a mapping of operation to kernel name")
        for operation, kernel in self.kernels.items():
            _check_kernel(operation, kernel)

    def __repr__(self) -> str:
        return _said(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Options from a mapping such as parsed JSON; an unknown key raises `PolicyError`."""
        options: Self = _from_mapping(cls, values)
        return options

    def worker_count(self) -> int:
        """Number of reading and quantizing threads."""
        return self.workers or usable_cores()


def _check_kernel(operation: object, kernel: object) -> None:
    """Raise `PolicyError` for an operation or a kernel that no platform has."""
    from .kernels.registry import OPERATIONS, kernel_names  # hundreds of modules, for who names a kernel

    if operation not in OPERATIONS:
        raise PolicyError(f"kernels names the operation {operation!r}; operations are {', '.join(OPERATIONS)}")
    names = kernel_names(str(operation))
    if kernel not in names:
        raise PolicyError(f"kernels has {kernel!r} for {operation}; kernels for it are {', '.join(names)}")


@dataclass(frozen=True, repr=False)
class QuantizationPolicy:
    """Which module gets which scheme.

    A pattern is a module's name, a glob, or a regular expression after `re:` that fits the whole name. Raises
    `PolicyError` for values of another type.
    """

    linear: str = "auto"
    """Scheme of the linear layers. `auto`: as the checkpoint is stored where it is quantized, else `quark_mxfp4`. The
    `quantization` argument of a load replaces it, unless that is `auto`."""

    experts: str | None = None
    """Scheme of the experts of MoE layers. None: the same as `linear`."""

    ignore: tuple[str, ...] = ()
    """Patterns of modules that are left as stored."""

    overrides: tuple[tuple[str, str], ...] = ()
    """(pattern, scheme) pairs, or a mapping: the first pattern that fits a module gives its scheme, whatever `ignore`
    and `default_ignore` say."""

    default_ignore: bool = True
    """Leave output head, embeddings, routers and gates as stored."""

    scale_mode: ScaleMode = "default"
    """How scales are chosen. `default`: by the rule of each scheme; `mse`: by the least squared error of each block,
    which the MX schemes, nvfp4 and int4_per_group offer."""

    def __post_init__(self) -> None:
        if self.scale_mode not in ("default", "mse"):
            raise PolicyError(f"scale_mode is {self.scale_mode!r}; choose default or mse")
        given: object = self.ignore
        if isinstance(given, str):
            raise PolicyError(f"ignore is the string {self.ignore!r}; give a tuple of patterns, ({self.ignore!r},)")
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if not all(isinstance(pattern, str) for pattern in self.ignore):
            raise PolicyError(f"ignore is {self.ignore!r}; give patterns as strings")
        overrides = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides
        pairs = tuple(tuple(pair) if not isinstance(pair, str) else (pair,) for pair in overrides)
        if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
            raise PolicyError(f"overrides is {self.overrides!r}; give (pattern, scheme) pairs or a mapping")
        object.__setattr__(self, "linear", known_name(self.linear))
        object.__setattr__(self, "experts", None if self.experts is None else known_name(self.experts))
        object.__setattr__(self, "overrides", tuple((pattern, known_name(scheme)) for pattern, scheme in pairs))

    def __repr__(self) -> str:
        return _said(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Policy from a mapping such as parsed JSON; an unknown key raises `PolicyError`."""
        policy: Self = _from_mapping(cls, values)
        return policy

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Policy from a file of its fields, in TOML where its name ends with .toml, else JSON; `PolicyError` if not."""
        try:
            text = Path(path).read_text()
            values = tomllib.loads(text) if str(path).endswith(".toml") else json.loads(text)
        except (OSError, ValueError) as error:
            raise PolicyError(f"{path} is no policy: {error}") from error
        if not isinstance(values, dict):
            raise PolicyError(f"{path} is no policy: it has no fields of a QuantizationPolicy")
        return cls.from_mapping(values)


def with_fit(options: LoadOptions | None, fit: int | str | None) -> LoadOptions:
    """Options with the `fit` that a caller gave beside them, if any."""
    options = options or LoadOptions()
    return options if fit is None else replace(options, fit=fit)


def without_fit(options: LoadOptions) -> LoadOptions:
    """Options for a load whose schemes are chosen."""
    return replace(options, fit=None, fit_context=None, fit_requests=None, fit_head=False, fit_sensitivity={})


def check_kinds(policy: object, options: object) -> None:
    """Raise `PolicyError` for a policy or options that are something else, such as a mapping of their fields."""
    for name, given, wanted in (("policy", policy, QuantizationPolicy), ("options", options, LoadOptions)):
        if given is not None and not isinstance(given, wanted):
            raise PolicyError(
                f"{name} is of type {type(given).__name__}; give a {wanted.__name__}, of a mapping with "
                f"{wanted.__name__}.from_mapping(...)"
            )
