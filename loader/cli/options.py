"""The options of commands, each defined once: in groups, dataclasses that also say what they mean for a load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import PolicyError
from ..ranks.launch import launched
from ..schemes.names import known_name
from .load_options import (
    CacheOptions,
    DigestOptions,
    FitOptions,
    ForwardOptions,
    LoadOptionsGroup,
    RunOptions,
    SizeOptions,
    StreamOptions,
)
from .logs import LogFormat, LogLevel, quiet_libraries, set_up_logging, set_up_server_logging
from .model_options import PolicyOptions, RankOptions, SourceOptions, complete_scheme

Model = Annotated[
    str | None, typer.Argument(help="Folder, hub id or URL of a checkpoint.", show_default="the bundled demo model")
]
Quantization = Annotated[
    str,
    typer.Option(
        "--quantization",
        "-q",
        metavar="SCHEME",
        autocompletion=complete_scheme,
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
        from ..options import LoadOptions

        quantization = known_name(self.quantization)
        policy = self.chosen.policy()
        options = LoadOptions.from_mapping({k: v for group in self.groups() for k, v in group.values().items()})
        return {"quantization": quantization, "policy": policy, "options": options, **self.source.values()}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(CheckpointOptions):
    """What `convert` takes, beside what only it has."""

    fitting: SizeOptions
    stream: StreamOptions

    def groups(self) -> tuple[LoadOptionsGroup, ...]:
        """The groups that make the `LoadOptions`."""
        return (*super().groups(), self.fitting, self.stream)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(CheckpointOptions):
    """What `plan` takes, and every command that builds a model."""

    device: Device = "auto"
    fitting: FitOptions
    forward: ForwardOptions

    def groups(self) -> tuple[LoadOptionsGroup, ...]:
        """The groups that make the `LoadOptions`."""
        return (*super().groups(), self.fitting, self.forward)

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
        if self.fitting.fit != "auto" and (self.fitting.context or self.fitting.requests):
            raise PolicyError("--context and --requests say what --fit auto leaves room for: give it, too")
        return {**super().arguments(), **self.ranks.values()}
