"""Groups of options that are fields of `LoadOptions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer

from ..errors import PolicyError
from ..options import Activations, CacheVerify, PageCache


class LoadOptionsGroup(Protocol):
    """A group of options that are fields of `LoadOptions`."""

    def values(self) -> dict[str, Any]:
        """The fields by name."""


@dataclass(frozen=True)
class RunOptions:
    """What it may take, and the kernels it uses."""

    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Limit, such as 16GiB. What is predicted to need more memory ends before a weight "
            "is read, with exit code 4. Under torchrun it is that of each rank; 64GiB/host is that of all on a host.",
            show_default="no limit",
        ),
    ] = None
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Go on where the machine has too little memory, instead of ending with exit code 4."
        ),
    ] = False
    staging: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Size of the arena that weights are read into, such as 64MiB; less means fewer workers.",
            show_default="2 pieces a worker, 3 on a GPU and in convert",
        ),
    ] = None
    chunk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Largest piece that is read and quantized at once, at least 4KiB; scale blocks stay whole.",
            show_default="8MiB",
        ),
    ] = None
    workers: Annotated[
        int | None, typer.Option(help="Number of threads that read and quantize.", show_default="one a core")
    ] = None
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Make an error of what is a warning without: a pattern that matches no module, a scheme or option "
            "that changes nothing, tensors that the model does not know, tied weights that differ, NaN in weights that "
            "are kept as stored.",
        ),
    ] = False
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPERATION=NAME",
            help="Choose the kernel of an operation by hand, such as linear=torch. Repeatable.",
            show_default="the first that can run",
        ),
    ] = None

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`."""
        kernels = dict(option_pair(text, "--kernel", "OPERATION=NAME") for text in self.kernel or ())
        limit, slash, scope = (self.max_memory or "").partition("/")
        if slash and scope not in ("rank", "host"):
            raise PolicyError(f"--max-memory is {self.max_memory!r}; write a size, a size/rank, or a size/host")
        sizes = {
            "max_memory": ("--max-memory", limit or self.max_memory), "staging_bytes": ("--staging", self.staging),
            "chunk_bytes": ("--chunk", self.chunk),
        }  # fmt: skip
        return {
            "workers": self.workers,
            "strict": self.strict,
            "force": self.force,
            "kernels": kernels,
            **({"memory_scope": scope} if slash else {}),
            **_bytes(sizes),
        }


@dataclass(frozen=True)
class SizeOptions:
    """What it has to fit into."""

    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Choose the schemes that lose least within this size, such as 16GiB, instead of --quantization: that "
            "of the peak of the load, or of the files of weights that convert writes. auto: what the machine, or the "
            "device, has free, less a reserve and an attention cache.",
            show_default="the scheme of --quantization",
        ),
    ] = None
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text of what the model is for, a few thousand tokens: measure on it how much the output feels each "
            "kind of module by depth, for --fit to choose by. It loads the model once more, in nl4, and leaves what "
            "was measured beside the file.",
            show_default="as measured on the demo model",
        ),
    ] = None
    sensitivity_each: Annotated[
        bool,
        typer.Option(
            "--sensitivity-each",
            help="Measure each module for itself with --sensitivity, or those of a layer that get one scheme together: "
            "finer, and one pass over the text for each.",
        ),
    ] = False

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`, but for what `sensitivity` is to be measured on."""
        if self.sensitivity is not None and self.fit is None:
            raise PolicyError("--sensitivity says what --fit is to choose by: give a size, too")
        if self.sensitivity_each and self.sensitivity is None:
            raise PolicyError("--sensitivity-each says how --sensitivity FILE measures: give a text, too")
        return {"fit": self.fit}


@dataclass(frozen=True)
class FitOptions(SizeOptions):
    """What it has to fit into."""

    context: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Length of the sequences that --fit auto leaves room for in the attention cache, and that plan counts "
            "it for.",
            show_default="the context of the model; for --fit auto at most 8192",
            min=1,
        ),
    ] = None
    fit_head: Annotated[
        bool,
        typer.Option(
            "--fit-head",
            help="Let --fit choose schemes for the output head and the embedding, too, which it leaves as stored "
            "otherwise.",
        ),
    ] = False
    requests: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", help="Number of such sequences at once.", show_default="one", min=1),
    ] = None

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`."""
        beside = {"fit_context": self.context, "fit_requests": self.requests} if self.fit == "auto" else {}
        return {**super().values(), **beside, **({"fit_head": True} if self.fit_head else {})}


@dataclass(frozen=True)
class StreamOptions:
    """How weights are read, and what is measured on the way."""

    page_cache: Annotated[
        PageCache,
        typer.Option(
            help="What becomes of the checkpoint in the page cache. auto: what was there stays, the rest is dropped "
            "once it is read. keep: all of it stays. drop: all of it is dropped.",
        ),
    ] = "auto"
    connections: Annotated[
        int | None,
        typer.Option(help="Requests in flight at once for a checkpoint that is read from a URL.", show_default="8"),
    ] = None
    stats: Annotated[
        Literal["on", "off"], typer.Option(help="Measure what quantization loses, for the report; off is faster.")
    ] = "on"

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`."""
        return {"page_cache": self.page_cache, "stats": self.stats == "on", "connections": self.connections}


@dataclass(frozen=True)
class ForwardOptions:
    """What the model computes with."""

    activations: Annotated[
        Activations,
        typer.Option(
            help="What the inputs of quantized layers are rounded to. auto: what the kernel does. none: they are not. "
            "emulate: rounded and back, as the checkpoint says, else to the format of the weights. Or the name of a "
            "format, such as mxfp4 or fp8.",
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        typer.Option(
            help="Number of threads that compute; idle ones sleep, unless OMP_WAIT_POLICY is set.",
            show_default="OMP_NUM_THREADS, else one a core that the process may use",
            min=1,
            max=4096,
        ),
    ] = None

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`."""
        return {"activations": self.activations}


@dataclass(frozen=True)
class CacheOptions:
    """Where the quantized form is left for later loads."""

    cache: Annotated[
        str | None,  # an empty path would be the current folder
        typer.Option(
            metavar="DIR",
            help="Leave the quantized form in this folder; later loads of the same read it.",
            show_default="no cache",
        ),
    ] = None
    cache_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Largest size of that folder, such as 200GiB; what was not used for longest is removed.",
            show_default="what the disk has",
        ),
    ] = None
    cache_verify: Annotated[
        CacheVerify,
        typer.Option(
            help="How the checkpoint's weights are known. samples: by 64 pages of each file, its size and its time of "
            "change. full: by every byte, which is read for that.",
        ),
    ] = "samples"

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`."""
        if self.cache_size is not None and self.cache is None:
            raise PolicyError(f"--cache-size {self.cache_size} is given without --cache: name the folder too")
        if self.cache_verify != "samples" and self.cache is None:
            raise PolicyError(f"--cache-verify {self.cache_verify} is given without --cache: name the folder too")
        return {
            "cache": self.cache,
            "cache_verify": self.cache_verify,
            **_bytes({"cache_bytes": ("--cache-size", self.cache_size)}),
        }


@dataclass(frozen=True)
class DigestOptions:
    """What proves that two loads ended in the same."""

    digest: Annotated[
        bool,
        typer.Option(
            "--digest",
            help="Compute a digest of the names, dtypes, shapes and bytes of the final tensors, for the report. It is "
            "the same whatever the order, the kernels and the machine.",
        ),
    ] = False

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`."""
        return {"digest": self.digest}


def _bytes(sizes: Mapping[str, tuple[str, str | None]]) -> dict[str, int]:
    """The sizes that were given, as numbers of bytes, by the field; of each the option and what was given for it."""
    from ..memory.amounts import parse_bytes

    return {name: parse_bytes(size, option) for name, (option, size) in sizes.items() if size is not None}


def option_pair(text: str, option: str, form: str) -> tuple[str, str]:
    left, separator, right = text.rpartition("=")
    if not (separator and left and right):
        raise PolicyError(f"{option} is {text!r}; write it as {form}")
    return left, right
