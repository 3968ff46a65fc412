"""The options that several commands share, in groups: each a dataclass that also says what it means for a load."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .errors import PolicyError

if TYPE_CHECKING:
    from .options import LoadOptions, QuantizationPolicy

Quantization = Annotated[str, typer.Option("--quantization", "-q", help="Scheme; `quantload schemes` lists them.")]
Device = Annotated[str, typer.Option(help="auto, cpu, or a torch device.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
Report = Annotated[Path | None, typer.Option(help="Also write the report to this file.")]


@dataclass(frozen=True)
class PolicyOptions:
    """Which module gets which scheme."""

    experts: Annotated[str | None, typer.Option(help="Another scheme for the experts of MoE layers.")] = None
    ignore: Annotated[
        list[str] | None, typer.Option(help="Modules left as stored: name, glob or re:regex. Repeatable.")
    ] = None
    override: Annotated[list[str] | None, typer.Option(help="PATTERN=SCHEME for some modules. Repeatable.")] = None
    no_default_ignore: Annotated[
        bool, typer.Option("--no-default-ignore", help="Quantize output head and routers too.")
    ] = False
    scale_mode: Annotated[str, typer.Option(help="default, or mse: least error, for MX schemes.")] = "default"

    def policy(self) -> QuantizationPolicy | None:
        """The policy, `None` where nothing was said."""
        from .options import QuantizationPolicy

        if self == PolicyOptions():
            return None
        overrides = [_pair(text, "--override", "PATTERN=SCHEME") for text in self.override or ()]
        return QuantizationPolicy(
            experts=self.experts,
            ignore=tuple(self.ignore or ()),
            overrides=tuple(overrides),
            default_ignore=not self.no_default_ignore,
            scale_mode=self.scale_mode,  # type: ignore[arg-type]  # checked there
        )


@dataclass(frozen=True)
class RunOptions:
    """What a load may take, and the kernels it uses."""

    max_memory: Annotated[str | None, typer.Option(help="Refuse a load predicted to need more, such as 16GiB.")] = None
    staging: Annotated[str | None, typer.Option(help="Size of the arena weights are read into, such as 64MiB.")] = None
    chunk: Annotated[str | None, typer.Option(help="Largest piece read at once, such as 8MiB.")] = None
    workers: Annotated[int | None, typer.Option(help="Reading and quantizing threads; one a core without it.")] = None
    strict: Annotated[bool, typer.Option("--strict", help="A pattern that matches nothing is an error.")] = False
    kernel: Annotated[list[str] | None, typer.Option(help="OPERATION=NAME to choose a kernel by hand. Repeatable.")] = (
        None
    )

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`."""
        kernels = dict(_pair(text, "--kernel", "OPERATION=NAME") for text in self.kernel or ())
        sizes = {"max_memory": self.max_memory, "staging_bytes": self.staging, "chunk_bytes": self.chunk}
        return {"workers": self.workers, "strict": self.strict, "kernels": kernels, **_bytes(sizes)}


@dataclass(frozen=True)
class StreamOptions:
    """How weights are read, and what is measured on the way."""

    page_cache: Annotated[str, typer.Option(help="auto, keep or drop.")] = "auto"
    stats: Annotated[str, typer.Option(help="on or off: measure what quantization loses.")] = "on"

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`."""
        if self.stats not in ("on", "off"):
            raise PolicyError(f"--stats is {self.stats!r}; choose on or off")
        return {"page_cache": self.page_cache, "stats": self.stats == "on"}


@dataclass(frozen=True)
class ForwardOptions:
    """What the model computes with."""

    activations: Annotated[str, typer.Option(help="auto, none, emulate, or a format such as mxfp4 or fp8.")] = "auto"

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`."""
        return {"activations": self.activations}


@dataclass(frozen=True)
class CacheOptions:
    """Where the quantized form is left for later loads."""

    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Leave the quantized form in this folder; later loads read it.")
    ] = None
    cache_size: Annotated[
        str | None, typer.Option(help="Largest size of the cache, such as 200GiB; the disk without it.")
    ] = None

    cache_verify: Annotated[
        str, typer.Option(help="samples, or full: know the checkpoint by every byte of it, which is read for that.")
    ] = "samples"

    def values(self) -> dict[str, Any]:
        """Fields of `LoadOptions`."""
        if self.cache_size is not None and self.cache is None:
            raise PolicyError(f"--cache-size {self.cache_size} is given without --cache: name the folder too")
        if self.cache_verify != "samples" and self.cache is None:
            raise PolicyError(f"--cache-verify {self.cache_verify} is given without --cache: name the folder too")
        return {"cache": self.cache, "cache_verify": self.cache_verify, **_bytes({"cache_bytes": self.cache_size})}


@dataclass(frozen=True)
class SourceOptions:
    """Where the checkpoint comes from."""

    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modeling code the checkpoint ships.")
    ] = False

    def values(self) -> dict[str, Any]:
        """Arguments of `load_quantized` and its like."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def load_options(*groups: RunOptions | StreamOptions | ForwardOptions | CacheOptions) -> LoadOptions:
    """The options of a load from those of a command; what a command does not offer keeps its default."""
    from .options import LoadOptions

    return LoadOptions.from_mapping({name: value for group in groups for name, value in group.values().items()})


def command_with_groups(function: Callable[..., None]) -> Callable[..., None]:
    """A command for typer whose parameters are those of `function`, groups of options taken apart."""
    hints = get_type_hints(function, include_extras=True)
    own = [hints[name] if is_dataclass(hints[name]) else parameter.replace(annotation=hints[name])
           for name, parameter in inspect.signature(function).parameters.items()]  # fmt: skip
    parameters = [each for part in own for each in (_options_of(part) if is_dataclass(part) else [part])]
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        function(**given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(group)]


def _bytes(sizes: Mapping[str, str | None]) -> dict[str, int]:
    """The sizes that were given, as numbers of bytes."""
    from .memory.amounts import parse_bytes

    return {name: parse_bytes(size) for name, size in sizes.items() if size is not None}


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    left, separator, right = text.rpartition("=")
    if not (separator and left and right):
        raise PolicyError(f"{option} is {text!r}; write it as {form}")
    return left, right
