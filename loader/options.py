"""What a user can choose about a load: frozen dataclasses whose unknown keys raise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from .errors import PolicyError

MIB = 1 << 20

PageCache = Literal["auto", "keep", "drop"]
CacheVerify = Literal["samples", "full"]
ScaleMode = Literal["default", "mse"]
Activations = Literal["auto", "none", "emulate", "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8", "fp8", "int8"]


def _from_mapping(cls: type[Any], values: Mapping[str, Any]) -> Any:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise PolicyError(
            f"{cls.__name__} does not know {', '.join(map(repr, unknown))}; it knows {', '.join(sorted(known))}"
        )
    return cls(**values)


@dataclass(frozen=True)
class LoadOptions:
    """How a load runs; nothing here changes the bytes that come out.

    `chunk_bytes`: largest piece read at once (bytes). `staging_bytes`: size of the arena the pieces are read
    into (bytes; default two buffers a worker). `max_memory`: limit for the predicted peak (bytes, None = no limit).
    `workers`: reading and quantizing threads (None = one a core). `page_cache`: `auto` leaves warm files alone and
    drops cold ones behind the reader. `strict`: a pattern that matches nothing is an error, not a warning.
    `stats`: measure what quantizing loses, in the kernels. `activations`: `auto` lets the kernels decide, `none` keeps
    activations as they are, `emulate` rounds them and back to what the checkpoint's config says or else to the scheme's
    own format, and the name of a format to that one, in a kernel where there is one for it. `retries`: how often a
    failed read is tried again. `kernels`: operation -> kernel name, to choose one by hand. `cache`: a folder where
    loads leave what they quantized, for the next load of the same to read instead; `cache_bytes`: its largest size
    (bytes, None = what the disk has), kept by removing what was not used for longest; `cache_verify`: what must be the
    same of the checkpoint's files beside their sizes, headers, times of change and `samples` of the weights, or the
    `full` content, which is read for it every time. Raises `PolicyError` for values out of range.
    """

    chunk_bytes: int = 8 * MIB
    staging_bytes: int | None = None
    max_memory: int | None = None
    workers: int | None = None
    page_cache: PageCache = "auto"
    stats: bool = True
    strict: bool = False
    activations: Activations = "auto"
    retries: int = 4
    kernels: Mapping[str, str] = field(default_factory=dict)
    cache: str | Path | None = None
    cache_bytes: int | None = None
    cache_verify: CacheVerify = "samples"

    def __post_init__(self) -> None:
        self._check_types()
        if self.chunk_bytes < 4096:
            raise PolicyError(f"chunk_bytes is {self.chunk_bytes}; give at least 4096")
        if self.workers is not None and self.workers < 1:
            raise PolicyError(f"workers is {self.workers}; give at least 1, or None for one a core")
        if self.page_cache not in ("auto", "keep", "drop"):
            raise PolicyError(f"page_cache is {self.page_cache!r}; choose auto, keep or drop")
        if self.cache_verify not in get_args(CacheVerify):
            raise PolicyError(f"cache_verify is {self.cache_verify!r}; choose {' or '.join(get_args(CacheVerify))}")
        if self.activations not in get_args(Activations):
            raise PolicyError(f"activations is {self.activations!r}; choose one of {', '.join(get_args(Activations))}")
        if self.retries < 0:
            raise PolicyError(f"retries is {self.retries}; give 0 or more")
        for name in ("staging_bytes", "max_memory", "cache_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise PolicyError(f"{name} is {value}; give a positive number of bytes")

    def _check_types(self) -> None:
        for name in ("chunk_bytes", "retries", "staging_bytes", "max_memory", "workers", "cache_bytes"):
            value = getattr(self, name)
            may_be_none = name not in ("chunk_bytes", "retries")
            if not (isinstance(value, int) and not isinstance(value, bool)) and not (value is None and may_be_none):
                raise PolicyError(f"{name} is {value!r}; give a whole number")
        for name in ("stats", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name} is {getattr(self, name)!r}; give True or False")
        if self.cache is not None and (not isinstance(self.cache, (str, Path)) or not str(self.cache)):
            raise PolicyError(f"cache is {self.cache!r}; give the path of a folder")
        if not isinstance(self.kernels, Mapping):
            raise PolicyError(f"kernels is {self.kernels!r}; give a mapping of operation to kernel name")
        for operation, kernel in self.kernels.items():
            _check_kernel(operation, kernel)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Options from a mapping such as parsed JSON; an unknown key raises `PolicyError`."""
        options: Self = _from_mapping(cls, values)
        return options

    def worker_count(self) -> int:
        """Number of reading and quantizing threads."""
        return self.workers or len(os.sched_getaffinity(0))


def _check_kernel(operation: object, kernel: object) -> None:
    """Raise `PolicyError` for an operation or a kernel that no platform has."""
    from .kernels.registry import OPERATIONS, kernel_names  # hundreds of modules, for who names a kernel

    if operation not in OPERATIONS:
        raise PolicyError(f"kernels names the operation {operation!r}; operations are {', '.join(OPERATIONS)}")
    names = kernel_names(str(operation))
    if kernel not in names:
        raise PolicyError(f"kernels has {kernel!r} for {operation}; kernels for it are {', '.join(names)}")


@dataclass(frozen=True)
class QuantizationPolicy:
    """Which module gets which scheme.

    `linear` and `experts` are scheme names (`experts=None`: the same as `linear`). `auto` is what the checkpoint has
    where it is quantized already, else `quark_mxfp4`. `ignore` are patterns of modules
    left as stored; `overrides` are (pattern, scheme) pairs, first match wins, and win over `ignore`. A pattern is a
    module name, a glob, or a regular expression after `re:`. `default_ignore` also leaves the output head,
    embeddings, routers and gates as stored. `scale_mode`: `default` chooses scales by the rule of each scheme, `mse`
    by the least squared error of each block, which the MX schemes offer. Raises `PolicyError` for values of another
    kind.
    """

    linear: str = "auto"
    experts: str | None = None
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()
    default_ignore: bool = True
    scale_mode: ScaleMode = "default"

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
        object.__setattr__(self, "overrides", pairs)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Policy from a mapping such as parsed JSON; an unknown key raises `PolicyError`."""
        policy: Self = _from_mapping(cls, values)
        return policy
