"""The options of commands, each defined once: in groups, dataclasses that also say what they mean for a load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer

from .cli_logging import LogFormat, LogLevel, quiet_libraries, set_up_logging, set_up_server_logging
from .errors import PolicyError
from .options import Activations, CacheVerify, PageCache, ScaleMode
from .ranks.launch import launched
from .schemes.names import SCHEME_NAMES, known_name

if TYPE_CHECKING:
    from .options import QuantizationPolicy


def _complete_scheme(incomplete: str) -> list[str]:
    """The scheme names that begin with what was typed, for the shell."""
    return [name for name in SCHEME_NAMES if name.startswith(incomplete.lower())]


Model = Annotated[
    str | None, typer.Argument(help="Folder, hub id or URL of a checkpoint.", show_default="the bundled demo model")
]
Quantization = Annotated[
    str,
    typer.Option(
        "--quantization",
        "-q",
        metavar="SCHEME",
        autocompletion=_complete_scheme,
        help="Scheme for the weights; `quantload schemes` lists them. auto: as the checkpoint is stored where it is "
        "quantized, else quark_mxfp4. none: quantize nothing.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where the model goes: cpu, or a torch device such as cuda:0. auto: a GPU that has kernels, else the CPU."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables, and nothing else there.")
]
Report = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the report, as JSON.", show_default="not written")
]

Html = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also write a page for a browser, which fetches nothing: charts of memory, sizes and errors.",
        show_default="not written",
    ),
]


class LoadOptionsGroup(Protocol):
    """A group of options that are fields of `LoadOptions`."""

    def values(self) -> dict[str, Any]:
        """The fields by name."""


@dataclass(frozen=True)
class PolicyOptions:
    """Which module gets which scheme."""

    experts: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            autocompletion=_complete_scheme,
            help="Scheme for the experts of MoE layers.",
            show_default="that of --quantization",
        ),
    ] = None
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave these modules as stored: a name, a glob, or re: and a regular expression for the whole name. "
            "Repeatable.",
            show_default="no module",
        ),
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SCHEME",
            help="Scheme for some modules, whatever else says they are left as stored; the first pattern that fits "
            "counts. Repeatable.",
            show_default="no module",
        ),
    ] = None
    no_default_ignore: Annotated[
        bool,
        typer.Option(
            "--no-default-ignore",
            help="Quantize output head, embeddings, routers and gates too, which are left as stored without it.",
        ),
    ] = False
    scale_mode: Annotated[
        ScaleMode,
        typer.Option(
            help="How scales are chosen. default: by the rule of the scheme. mse: for the least squared error of each "
            "block, for MX schemes and nvfp4 only.",
        ),
    ] = "default"

    policy_file: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            metavar="FILE",
            help="All of this from a JSON or TOML file of the fields of a QuantizationPolicy, as plan --save-policy "
            "writes it.",
            show_default="no file",
        ),
    ] = None

    def policy(self) -> QuantizationPolicy | None:
        """The policy, `None` where nothing was said."""
        from .options import QuantizationPolicy

        if self == PolicyOptions():
            return None
        if self.policy_file is not None:
            if replace(self, policy_file=None) != PolicyOptions():
                raise PolicyError("--policy says which module gets which scheme: give no other option for that")
            return QuantizationPolicy.from_file(self.policy_file)
        overrides = [_pair(text, "--override", "PATTERN=SCHEME") for text in self.override or ()]
        return QuantizationPolicy(
            experts=self.experts,
            ignore=tuple(self.ignore or ()),
            overrides=tuple(overrides),
            default_ignore=not self.no_default_ignore,
            scale_mode=self.scale_mode,
        )


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
        kernels = dict(_pair(text, "--kernel", "OPERATION=NAME") for text in self.kernel or ())
        limit, slash, scope = (self.max_memory or "").partition("/")
        if slash and scope not in ("rank", "host"):
            raise PolicyError(f"--max-memory is {self.max_memory!r}; write a size, a size/rank, or a size/host")
        sizes = {"max_memory": limit or self.max_memory, "staging_bytes": self.staging, "chunk_bytes": self.chunk}
        return {
            "workers": self.workers,
            "strict": self.strict,
            "force": self.force,
            "kernels": kernels,
            **({"memory_scope": scope} if slash else {}),
            **_bytes(sizes),
        }


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
        return {"cache": self.cache, "cache_verify": self.cache_verify, **_bytes({"cache_bytes": self.cache_size})}


@dataclass(frozen=True)
class LogOptions:
    """What it says on standard error."""

    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more: the same as --log-level debug.")] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Log errors only, and show no progress: the same as --log-level error.")
    ] = False
    log_level: Annotated[LogLevel, typer.Option(help="Least level that is logged.")] = "info"
    log_format: Annotated[LogFormat, typer.Option(help="Form of log lines; json is one object a line.")] = "text"

    def set_up(self) -> None:
        """Log so from now on. Raises `PolicyError` for both of --verbose and --quiet."""
        if self.verbose and self.quiet:
            raise PolicyError("--verbose and --quiet are both given; choose one")
        quiet_libraries(self._level() == "debug")
        set_up_logging(self._level(), self.log_format)

    def set_up_server(self) -> None:
        """Log as a server from now on: nothing but log lines, all in one form."""
        set_up_server_logging(self._level(), self.log_format)

    def _level(self) -> LogLevel:
        if launched().rank > 0:  # one rank logs
            return "error"
        return "debug" if self.verbose else "error" if self.quiet else self.log_level

    def progress(self) -> bool | None:
        """What `progress` of a load is: a bar for people, none where log lines are for a program."""
        return False if self.quiet or self.log_format == "json" or launched().rank > 0 else None


@dataclass(frozen=True)
class SourceOptions:
    """Where the checkpoint comes from."""

    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default="the hub's default branch")
    ] = None
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read a hub id where it is, in ranges, instead of downloading it first: the same as hf:// before it.",
        ),
    ] = False
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run modeling code that the checkpoint ships; it is never run without this."
        ),
    ] = False

    def address(self, model: str) -> str:
        """What stands for a model. Raises `PolicyError` for --stream with what is no hub id."""
        if not self.stream or model.lower().startswith("hf://"):
            return model
        if "://" in model or os.path.lexists(model) or model.count("/") != 1:
            raise PolicyError(f"--stream is for hub ids (owner/name), and MODEL is {model!r}")
        return f"hf://{model}"

    def values(self) -> dict[str, Any]:
        """Arguments of `load_quantized` and its like."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class RankOptions:
    """How torchrun's processes divide a model."""

    expert_parallel: Annotated[
        bool,
        typer.Option(
            "--expert-parallel",
            help="Under torchrun: let each rank have whole experts, instead of a part of each.",
        ),
    ] = False

    def values(self) -> dict[str, Any]:
        """Arguments of `load_quantized`. Raises `PolicyError` for what one process has nobody to share with."""
        if launched().ranks == 1:
            if self.expert_parallel:
                raise PolicyError(
                    "--expert-parallel is given to one process; start several with torchrun --nproc-per-node N -m "
                    "quantload"
                )
            return {}
        return {"tp": "auto", "expert_parallel": self.expert_parallel}


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


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What every command takes that reads a checkpoint."""

    quantization: Quantization = "auto"
    chosen: PolicyOptions
    run: RunOptions
    source: SourceOptions
    logs: LogOptions

    def groups(self) -> tuple[LoadOptionsGroup, ...]:
        """The groups that make the `LoadOptions`; what a command does not offer keeps its default."""
        return (self.run,)

    def arguments(self) -> dict[str, Any]:
        """Arguments of `load_quantized` and its like. Raises `PolicyError`."""
        from .options import LoadOptions

        quantization = known_name(self.quantization)
        policy = self.chosen.policy()
        options = LoadOptions.from_mapping({k: v for group in self.groups() for k, v in group.values().items()})
        return {"quantization": quantization, "policy": policy, "options": options, **self.source.values()}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(CheckpointOptions):
    """What `convert` takes, beside what only it has."""

    stream: StreamOptions

    def groups(self) -> tuple[LoadOptionsGroup, ...]:
        """The groups that make the `LoadOptions`."""
        return (*super().groups(), self.stream)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(CheckpointOptions):
    """What `plan` takes, and every command that builds a model."""

    device: Device = "auto"
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Choose the schemes that lose least with a peak below this size, such as 16GiB, instead of "
            "--quantization.",
            show_default="the scheme of --quantization",
        ),
    ] = None
    forward: ForwardOptions

    def groups(self) -> tuple[LoadOptionsGroup, ...]:
        """The groups that make the `LoadOptions`."""
        return (*super().groups(), self.forward)

    def arguments(self) -> dict[str, Any]:
        """Arguments of `load_quantized` and `plan_quantized`. Raises `PolicyError`."""
        return {**super().arguments(), "device": self.device}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(PlanOptions):
    """What `load` and `serve` take, which read the weights too."""

    stream: StreamOptions
    caching: CacheOptions
    ranks: RankOptions
    proof: DigestOptions

    def groups(self) -> tuple[LoadOptionsGroup, ...]:
        """The groups that make the `LoadOptions`."""
        return (*super().groups(), self.stream, self.caching, self.proof)

    def arguments(self) -> dict[str, Any]:
        """Arguments of `load_quantized`. Raises `PolicyError`."""
        return {**super().arguments(), **self.ranks.values()}


def _bytes(sizes: Mapping[str, str | None]) -> dict[str, int]:
    """The sizes that were given, as numbers of bytes."""
    from .memory.amounts import parse_bytes

    return {name: parse_bytes(size) for name, size in sizes.items() if size is not None}


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    left, separator, right = text.rpartition("=")
    if not (separator and left and right):
        raise PolicyError(f"{option} is {text!r}; write it as {form}")
    return left, right
