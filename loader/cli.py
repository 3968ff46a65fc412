"""The `quantload` command: thin, every subcommand one call into the package."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .errors import (
    CheckpointError,
    MemoryBudgetError,
    PolicyError,
    QuantloadError,
    RouteError,
    UnsupportedCheckpointError,
)

if TYPE_CHECKING:
    from .options import LoadOptions, QuantizationPolicy

EXIT_USAGE, EXIT_CHECKPOINT, EXIT_BUDGET, EXIT_OTHER = 2, 3, 4, 1
DEMO_MODEL = Path(__file__).parent / "demo_model"

app = typer.Typer(
    help="Stream a checkpoint straight into a quantized model.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_show_locals=False,  # an API key may be among them
)
console = Console(stderr=True)

Model = Annotated[str | None, typer.Argument(help="Folder or hub id; the bundled demo model without it.")]
Quantization = Annotated[str, typer.Option("--quantization", "-q", help="Scheme; `quantload schemes` lists them.")]
Device = Annotated[str, typer.Option(help="auto, cpu, or a torch device.")]
Experts = Annotated[str | None, typer.Option(help="Another scheme for the experts of MoE layers.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Modules left as stored: name, glob or re:regex. Repeatable.")]
Override = Annotated[list[str] | None, typer.Option(help="PATTERN=SCHEME for some modules. Repeatable.")]
NoDefaultIgnore = Annotated[bool, typer.Option("--no-default-ignore", help="Quantize output head and routers too.")]
ScaleModeOption = Annotated[str, typer.Option("--scale-mode", help="default, or mse: least error, for MX schemes.")]
MaxMemory = Annotated[str | None, typer.Option(help="Refuse a load predicted to need more, such as 16GiB.")]
Staging = Annotated[str | None, typer.Option(help="Size of the arena weights are read into, such as 64MiB.")]
Chunk = Annotated[str | None, typer.Option(help="Largest piece read at once, such as 8MiB.")]
Workers = Annotated[int | None, typer.Option(help="Reading and quantizing threads; one a core without it.")]
PageCacheOption = Annotated[str, typer.Option("--page-cache", help="auto, keep or drop.")]
Stats = Annotated[str, typer.Option(help="on or off: measure what quantization loses.")]
Strict = Annotated[bool, typer.Option("--strict", help="A pattern that matches nothing is an error.")]
Kernel = Annotated[list[str] | None, typer.Option(help="OPERATION=NAME to choose a kernel by hand. Repeatable.")]
Activations = Annotated[str, typer.Option(help="auto, none, emulate, or a format such as mxfp4 or fp8.")]
Cache = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Leave the quantized form in this folder; later loads read it.")
]
CacheSize = Annotated[str | None, typer.Option(help="Largest size of the cache, such as 200GiB; the disk without it.")]
Revision = Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modeling code the checkpoint ships.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("quantload"))
        raise typer.Exit


@app.callback(epilog="Exit codes: 0; 2 usage; 3 bad checkpoint; 4 out of budget; 1 other.")
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Stream a checkpoint straight into a quantized model."""


@app.command()
def load(
    model: Model = None,
    quantization: Quantization = "auto",
    device: Device = "auto",
    experts: Experts = None,
    ignore: Ignore = None,
    override: Override = None,
    no_default_ignore: NoDefaultIgnore = False,
    scale_mode: ScaleModeOption = "default",
    max_memory: MaxMemory = None,
    staging: Staging = None,
    chunk: Chunk = None,
    workers: Workers = None,
    page_cache: PageCacheOption = "auto",
    stats: Stats = "on",
    strict: Strict = False,
    kernel: Kernel = None,
    activations: Activations = "auto",
    cache: Cache = None,
    cache_size: CacheSize = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    report: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Load a model, and say what was quantized, what it lost and how much memory it took."""
    policy = _policy(experts, ignore, override, no_default_ignore, scale_mode)
    options = _options(
        max_memory, staging, chunk, workers, page_cache, stats, strict, kernel, activations, cache, cache_size
    )
    if report is not None:
        _check_writable(report)
    from .load import load_quantized

    with _progress_bar() as progress:
        loaded = load_quantized(
            _model(model), quantization, device=device, policy=policy, options=options, revision=revision,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if report is not None:
        _save(loaded.load_report, report)
    if as_json:
        _print_json(loaded.load_report.to_dict())
    else:
        _render(loaded.load_report)


@app.command()
def plan(
    model: Model = None,
    quantization: Quantization = "auto",
    device: Device = "auto",
    experts: Experts = None,
    ignore: Ignore = None,
    override: Override = None,
    no_default_ignore: NoDefaultIgnore = False,
    scale_mode: ScaleModeOption = "default",
    max_memory: MaxMemory = None,
    staging: Staging = None,
    chunk: Chunk = None,
    workers: Workers = None,
    strict: Strict = False,
    kernel: Kernel = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Say what a load would do and how much memory it would take, from the headers alone."""
    policy = _policy(experts, ignore, override, no_default_ignore, scale_mode)
    options = _options(max_memory, staging, chunk, workers, "auto", "on", strict, kernel, "auto")
    from .load import plan_quantized

    draft = plan_quantized(
        _model(model), quantization, device=device, policy=policy, options=options, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    modules = [
        {"name": a.name, "kind": a.kind, "scheme": a.scheme.name if a.scheme is not None else None, "reason": a.reason}
        for a in draft.assignments
    ]
    summary = draft.plan.memory.to_dict() | {"fallback_conversions": draft.plan.whole_conversions, "modules": modules}
    if as_json:
        _print_json(summary)
    else:
        from .memory.summary import print_plan

        print_plan(draft.plan.memory, modules, Console())


@app.command()
def serve(
    model: Model = None,
    quantization: Quantization = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="QUANTLOAD_API_KEY", help="Required of every request but /health.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The name clients use; MODEL without it.")] = None,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Batch requests with transformers' paged scheduler.")
    ] = False,
    device: Device = "auto",
    experts: Experts = None,
    ignore: Ignore = None,
    override: Override = None,
    no_default_ignore: NoDefaultIgnore = False,
    scale_mode: ScaleModeOption = "default",
    max_memory: MaxMemory = None,
    staging: Staging = None,
    chunk: Chunk = None,
    workers: Workers = None,
    page_cache: PageCacheOption = "auto",
    stats: Stats = "on",
    strict: Strict = False,
    kernel: Kernel = None,
    activations: Activations = "auto",
    cache: Cache = None,
    cache_size: CacheSize = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Load a model and serve it over an OpenAI-compatible API, with /metrics, /health and /load_report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the server takes over as soon as it listens
    policy = _policy(experts, ignore, override, no_default_ignore, scale_mode)
    options = _options(
        max_memory, staging, chunk, workers, page_cache, stats, strict, kernel, activations, cache, cache_size
    )
    try:
        from .server.command import serve_model
    except ImportError as error:
        raise PolicyError(f"serving needs more packages ({error.name}): pip install 'quantload[serve]'") from error
    serve_model(
        _model(model), quantization, device=device, policy=policy, options=options, revision=revision,
        trust_remote_code=trust_remote_code, host=host, port=port, api_key=api_key,
        served_model_name=served_model_name or _display_name(model), continuous_batching=continuous_batching,
    )  # fmt: skip


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    quantization: Quantization = "auto",
    checkpoint_format: Annotated[
        str, typer.Option("--format", help="quark, compressed-tensors or, for gpt-oss, mxfp4.")
    ] = "quark",
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 4GB.")] = "4GB",
    experts: Experts = None,
    ignore: Ignore = None,
    override: Override = None,
    no_default_ignore: NoDefaultIgnore = False,
    scale_mode: ScaleModeOption = "default",
    max_memory: MaxMemory = None,
    staging: Staging = None,
    chunk: Chunk = None,
    workers: Workers = None,
    page_cache: PageCacheOption = "auto",
    stats: Stats = "on",
    strict: Strict = False,
    kernel: Kernel = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    report: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Write a quantized checkpoint, streaming; run again after an interruption, it goes on where it was."""
    policy = _policy(experts, ignore, override, no_default_ignore, scale_mode)
    options = _options(max_memory, staging, chunk, workers, page_cache, stats, strict, kernel, "auto")
    if report is not None:
        _check_writable(report)
    from .convert import convert_checkpoint
    from .memory.budget import parse_bytes

    with _progress_bar("converting") as progress:
        made = convert_checkpoint(
            model, out, quantization, format=checkpoint_format, policy=policy, options=options,
            max_shard_bytes=parse_bytes(max_shard_size), revision=revision, trust_remote_code=trust_remote_code,
            progress=progress,
        )  # fmt: skip
    if report is not None:
        _save(made, report)
    if as_json:
        _print_json(made.to_dict())
    else:
        _render(made)


@app.command()
def schemes(
    device: Annotated[str, typer.Option(help="The device to choose kernels for.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Say what there is for each scheme and format: layers, checkpoints read and written, activations, kernels."""
    from .schemes.listing import list_read_only, list_schemes, print_schemes

    if as_json:
        _print_json({"device": device, "schemes": list_schemes(device), "read_only": list_read_only()})
    else:
        print_schemes(device, Console())


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A report that `quantload load --report` wrote.")],
    as_json: Json = False,
) -> None:
    """Show a saved load report."""
    from .memory.report import LoadReport

    try:
        saved = LoadReport.load(path)
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror}") from error
    if as_json:
        _print_json(saved.to_dict())
    else:
        _render(saved)


def main() -> None:
    """Run the command line; exit codes: 0, 2 usage, 3 bad checkpoint, 4 out of budget, 1 other."""
    _set_up_logging()
    try:
        app()
    except QuantloadError as error:
        _print_error(str(error))
        sys.exit(_exit_code(error))
    except KeyboardInterrupt:
        console.print("interrupted", style="red")
        sys.exit(130)
    except BrokenPipeError:
        _drop_stdout()
        sys.exit(EXIT_OTHER)
    except OSError as error:  # standard output on a full disk, for one
        _drop_stdout()
        _print_error(f"{error.filename or 'standard output'}: {error.strerror or error}")
        sys.exit(EXIT_OTHER)


def _print_error(message: str) -> None:
    console.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)


def _drop_stdout() -> None:
    """What is still buffered for a standard output that takes nothing would raise again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(error: QuantloadError) -> int:
    if isinstance(error, (CheckpointError, RouteError, UnsupportedCheckpointError)):
        return EXIT_CHECKPOINT
    if isinstance(error, MemoryBudgetError):
        return EXIT_BUDGET
    return EXIT_USAGE if isinstance(error, PolicyError) else EXIT_OTHER


def _model(model: str | None) -> str | Path:
    return DEMO_MODEL if model is None else model


def _display_name(model: str | None) -> str:
    return "quantload-demo" if model is None else model


def _policy(
    experts: str | None, ignore: list[str] | None, override: list[str] | None, no_default_ignore: bool, scale_mode: str
) -> QuantizationPolicy | None:
    from .options import QuantizationPolicy

    if not (experts or ignore or override or no_default_ignore or scale_mode != "default"):
        return None
    overrides = [_pair(text, "--override", "PATTERN=SCHEME") for text in override or ()]
    return QuantizationPolicy(
        experts=experts, ignore=tuple(ignore or ()), overrides=tuple(overrides), default_ignore=not no_default_ignore,
        scale_mode=scale_mode,  # type: ignore[arg-type]  # checked there
    )  # fmt: skip


def _options(
    max_memory: str | None, staging: str | None, chunk: str | None, workers: int | None, page_cache: str, stats: str,
    strict: bool, kernel: list[str] | None, activations: str, cache: Path | None = None, cache_size: str | None = None,
) -> LoadOptions:  # fmt: skip
    from .memory.budget import parse_bytes
    from .options import LoadOptions

    if stats not in ("on", "off"):
        raise PolicyError(f"--stats is {stats!r}; choose on or off")
    values: dict[str, Any] = {
        "max_memory": parse_bytes(max_memory) if max_memory is not None else None,
        "staging_bytes": parse_bytes(staging) if staging is not None else None,
        "workers": workers, "page_cache": page_cache, "stats": stats == "on", "strict": strict,
        "activations": activations, "kernels": dict(_pair(text, "--kernel", "OPERATION=NAME") for text in kernel or ()),
        "cache": cache, "cache_bytes": parse_bytes(cache_size) if cache_size is not None else None,
    }  # fmt: skip
    if chunk is not None:
        values["chunk_bytes"] = parse_bytes(chunk)
    return LoadOptions.from_mapping(values)


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    left, separator, right = text.rpartition("=")
    if not (separator and left and right):
        raise PolicyError(f"{option} is {text!r}; write it as {form}")
    return left, right


def _check_writable(path: Path) -> None:
    """Raise before a load whose report could not be written after it."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise QuantloadError(f"{path} cannot be written: give --report a file in a folder that you may write to")


def _save(report: Any, path: Path) -> None:
    try:
        report.save(path)
    except OSError as error:
        raise QuantloadError(f"{path} cannot be written: {error.strerror}; the model was loaded") from error


class _ConsoleHandler(logging.Handler):
    """Prints log lines above a progress bar, never wrapped: programs read them."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), highlight=False, markup=False, soft_wrap=True)


def _set_up_logging() -> None:
    logger = logging.getLogger("quantload")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())


@contextmanager
def _progress_bar(doing: str = "loading") -> Iterator[Callable[[int, int], None] | None]:
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(doing), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("load", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, allow_nan=False), flush=True)


def _render(report: Any) -> None:
    from .memory.report import render

    render(report, Console())


if __name__ == "__main__":
    main()
