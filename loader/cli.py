"""The `quantload` command: thin, every subcommand one call into the package."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from .cli_groups import command_with_groups
from .cli_logging import console, log_as_json, set_up_logging
from .cli_options import ConvertOptions, Html, Json, Model, ModelOptions, PlanOptions, Report, SourceOptions
from .cli_pages import failure_written, typed, write_report_page
from .errors import (
    CheckpointError,
    MemoryBudgetError,
    PolicyError,
    QuantloadError,
    RouteError,
    UnsupportedCheckpointError,
)
from .interrupts import interrupt_first, interrupt_held
from .local_paths import local_path
from .ranks.launch import launched, process_group
from .schemes.names import ExportName
from .shortage import importing, is_shortage, refused, shortage_behind
from .threads import settle_threads

if TYPE_CHECKING:
    from .fit_policy import Fitted

logger = logging.getLogger("quantload")

EXIT_USAGE, EXIT_CHECKPOINT, EXIT_BUDGET, EXIT_OTHER = 2, 3, 4, 1
_NO_TERMINAL_WIDTH = 10_000
LoadFormat = Annotated[
    Literal["auto", "dummy"],
    typer.Option(
        help="Where weights come from; dummy: random numbers, without reading any, for planning and benchmarks. A "
        "config.json is enough then."
    ),
]
RequestLogMode = Literal["all", "no-probes", "off"]  # as in server/request_log.py, which needs the extra to be imported
LayerMetrics = Literal["auto", "on", "off"]  # as in memory/metrics.py
LIBRARIES = "the libraries that are imported first: torch, transformers, numba"
ROOM_FOR_LIBRARIES = 1088 << 20
"""Bytes of address space that they need in builds for CPUs, which are the smallest; some of them end the process, or
crash it, where they find less."""
DEMO_MODEL = Path(__file__).parent / "demo_model"

app = typer.Typer(
    help="Stream a checkpoint straight into a quantized model.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,  # an API key may be among them
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("quantload"))
        raise typer.Exit


@app.callback(
    epilog="Every option can be given as an environment variable: --max-memory as QUANTLOAD_MAX_MEMORY. "
    "Exit codes: 0; 2 usage; 3 bad checkpoint; 4 out of budget; 1 other."
)
def about(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Stream a checkpoint straight into a quantized model."""


@app.command()
@command_with_groups
def load(
    *,
    model: Model = None,
    load_format: LoadFormat = "auto",
    chosen: ModelOptions,
    as_json: Json = False,
    report: Report = None,
    html: Html = None,
) -> None:
    """Load a model, and say what was quantized, what it lost and how much memory it took."""
    chosen.logs.set_up()
    settle_threads(chosen.forward.threads)
    arguments = chosen.arguments()
    report, html = _writable(report), _writable(html, "--html")
    given = _model(model, chosen.source)
    with failure_written(html if launched().rank == 0 else None, given, arguments["quantization"], arguments["device"]):
        _fit(model, chosen, arguments)
        with _libraries():
            from .load import load_quantized

        with process_group(arguments["device"]):
            weights, progress = _weights(load_format), chosen.logs.progress()
            done = load_quantized(given, progress=progress, weights=weights, **arguments).load_report
    done.command = typed()
    if launched().rank == 0:
        write_report_page(done.to_dict(), html)
        _tell(done, report, as_json)


def _weights(load_format: str) -> Literal["checkpoint", "dummy"]:
    return "dummy" if load_format == "dummy" else "checkpoint"


@app.command()
@command_with_groups
def plan(
    *,
    model: Model = None,
    chosen: PlanOptions,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Length of the sequence that the attention cache is counted for.",
            show_default="the context of the model",
            min=1,
        ),
    ] = None,
    save_policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write which module gets which scheme, as JSON that --policy reads.",
            show_default="not written",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a load would do and how much memory it would take, from the headers alone."""
    chosen.logs.set_up()
    settle_threads(chosen.forward.threads)
    arguments, save_policy = chosen.arguments(), _writable(save_policy, "--save-policy")
    fitted = _fit(model, chosen, arguments)
    with _libraries():
        from .draft import plan_quantized
        from .fitting import beside_peak, judge_draft

    draft = plan_quantized(_model(model, chosen.source), **arguments)
    modules = [
        {"name": a.name, "kind": a.kind, "scheme": a.scheme.name if a.scheme is not None else None, "reason": a.reason}
        for a in draft.assignments
    ]
    left, options = draft.plan.leftovers, arguments["options"]
    verdict = judge_draft(draft, options)
    summary = draft.plan.memory.to_dict() | {
        "fallback_conversions": draft.plan.whole_conversions,
        "modules": modules,
        "unexpected": [*left.unexpected],
        "unexpected_bytes": left.unexpected_bytes,
        "ignored_tensors": len(left.ignored),
        "initialized": [*left.initialized],
        "overlaid": [*left.overlaid],
        "unapplied": [{"message": str(each), **asdict(each)} for each in draft.unapplied],
        "fetches": None if draft.plan.fetches is None else draft.plan.fetches._asdict(),
        "verdict": verdict.to_dict(),
        "beside_the_peak": beside_peak(draft, tokens).to_dict(),
        "fit": None if fitted is None else fitted.to_dict(),
    }
    if save_policy is not None:
        save_policy.write_text(json.dumps(asdict(draft.rules.policy), indent=1) + "\n")
    if as_json:
        _print_json(summary)
    else:
        from .memory.summary import print_plan

        with _to_stdout():
            print_plan(summary, draft.plan.memory, _tables())
    if verdict.state == "does not fit" and not options.force:
        raise typer.Exit(EXIT_BUDGET)


@app.command()
@command_with_groups
def serve(
    *,
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but a local one can be reached from other machines.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one, which the log names.", min=0, max=65535)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Bearer token that every request but /health must carry. Other users see it in the process list: give "
            "it as QUANTLOAD_API_KEY, or in a file.",
            show_default="no key is asked for",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the API key and nothing else.", show_default="no file"),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Host name that requests may be for, also *.NAME, or * for any. Repeatable.",
            show_default="any; on a local address the names of this machine alone",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model in the API.", show_default="MODEL as given")
    ] = None,
    continuous_batching: Annotated[
        bool | None,
        typer.Option(
            "--continuous-batching/--no-continuous-batching",
            help="Generate for requests together, with transformers' paged scheduler, or one after the other.",
            show_default="together on a CPU, where the model allows it; the log says why not",
        ),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(
            metavar="NUMBER", help="Requests that may wait for their turn; others are told to come back later.", min=0
        ),
    ] = 256,
    request_log: Annotated[
        RequestLogMode, typer.Option(help="Requests that are logged, a line each; probes are /health and /metrics.")
    ] = "all",
    layer_metrics: Annotated[
        LayerMetrics,
        typer.Option(help="Show gauges for each layer in /metrics; auto: for models of up to 512 quantized layers."),
    ] = "auto",
    load_format: LoadFormat = "auto",
    reload_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Let POST /reload exchange the weights for those of a checkpoint below this folder; with an API key.",
            show_default="it does not",
        ),
    ] = None,
    weight_updates: Annotated[
        bool,
        typer.Option("--weight-updates", help="Let trainers send new weights over HTTP; with an API key."),
    ] = False,
    chosen: ModelOptions,
) -> None:
    """Load a model and serve it over an OpenAI-compatible API, with /metrics, /health and /load_report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the server takes over as soon as it listens
    chosen.logs.set_up()
    if any(argument.partition("=")[0] == "--api-key" for argument in sys.argv):
        logger.warning("Other users see --api-key in the process list; use QUANTLOAD_API_KEY or --api-key-file instead")
    settle_threads(chosen.forward.threads)
    arguments = chosen.arguments()
    try:
        with _libraries():
            from .server.command import serve_model
    except ImportError as error:
        raise PolicyError(f"serving needs more packages ({error.name}): pip install 'quantload[serve]'") from error
    _fit(model, chosen, arguments)
    chosen.logs.set_up_server()
    with process_group(arguments["device"]):
        serve_model(
            _model(model, chosen.source), host=host, port=port, api_key=api_key, api_key_file=api_key_file,
            allowed_hosts=allowed_host or (), served_model_name=served_model_name or _display_name(model),
            continuous_batching=continuous_batching, max_queue=max_queue, request_log=request_log,
            layer_metrics=layer_metrics, reload_root=reload_root, weight_updates=weight_updates,
            weights=_weights(load_format), **arguments,
        )  # fmt: skip


@app.command()
@command_with_groups
def convert(
    *,
    model: Annotated[str, typer.Argument(help="Folder, hub id or URL of a checkpoint.")],
    out: Annotated[str, typer.Argument(help="Folder to write, or its URL in an object store; it must not exist.")],
    checkpoint_format: Annotated[
        ExportName,
        typer.Option(
            "--format",
            help="Whose form of a checkpoint; modelopt is for nvfp4, mxfp4 that of gpt-oss.",
        ),
    ] = "quark",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights, such as 4GB.")] = "4GB",
    no_model_card: Annotated[
        bool, typer.Option("--no-model-card", help="Copy no license files, and write no model card (README.md).")
    ] = False,
    chosen: ConvertOptions,
    as_json: Json = False,
    report: Report = None,
) -> None:
    """Write a quantized checkpoint, streaming; run again after an interruption, it goes on where it was."""
    chosen.logs.set_up()
    arguments = chosen.arguments()
    report = _writable(report)
    with _libraries():
        from .convert.flow import convert_checkpoint

    made = convert_checkpoint(
        chosen.source.address(model), out, format=checkpoint_format, max_shard_bytes=max_shard_size,
        progress=chosen.logs.progress(), model_card=not no_model_card, **arguments,
    )  # fmt: skip
    _tell(made, report, as_json)


@app.command()
def schemes(
    device: Annotated[
        str, typer.Option(help="Device to choose kernels for: cpu, or a torch device such as cuda.")
    ] = "cpu",
    as_json: Json = False,
) -> None:
    """Say what there is for each scheme and format: layers, checkpoints read and written, activations, kernels."""
    from .schemes.listing import list_read_only, list_schemes, print_schemes

    if as_json:
        _print_json({"device": device, "schemes": list_schemes(device), "read_only": list_read_only()})
    else:
        with _to_stdout():
            print_schemes(device, _tables())


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="File that --report of load or convert wrote.")],
    as_json: Json = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a page for a browser instead, which fetches nothing: charts of memory, sizes and errors.",
            show_default="tables on the terminal",
        ),
    ] = None,
) -> None:
    """Show a saved load report, on the terminal or as a page."""
    from .memory.report import LoadReport

    html = _writable(html, "--html")
    try:
        saved = LoadReport.load(local_path(path, "PATH", PolicyError))
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror}") from error
    write_report_page(saved.to_dict(), html)
    if html is None or as_json:
        _show(saved, as_json)


def main() -> None:
    """Run the command line; exit codes: 0, 2 usage, 3 bad checkpoint, 4 out of budget, 1 other."""
    set_up_logging()
    settle_threads()
    try:
        with interrupt_first():
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
    except Exception as error:
        if not isinstance(error, OSError) and not is_shortage(error):
            raise
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    """Say what the system refused, and the exit code for it."""
    if is_shortage(error):
        _print_error(str(refused("the program itself", error)))
        return EXIT_BUDGET
    assert isinstance(error, OSError)
    _drop_stdout()
    _print_error(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    return EXIT_OTHER


@contextmanager
def _libraries() -> Iterator[None]:
    """Import what a command is made of inside. Raises `MemoryBudgetError` where there is no memory for it.

    Ctrl-C waits for the end: torch imports numpy in C++, swallows an interrupt of that and goes on with half of it.
    """
    from .memory.limits import check_room

    if "torch" not in sys.modules:
        check_room(ROOM_FOR_LIBRARIES, LIBRARIES)
    with interrupt_held(), importing(LIBRARIES):
        yield


@contextmanager
def _to_stdout() -> Iterator[None]:
    """What standard output refuses inside, on a full disk for one, is said of it."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if not is_shortage(error):
            error.filename = error.filename or "standard output"
        raise


def _print_error(message: str) -> None:
    if log_as_json():
        logging.getLogger("quantload").error(message)
        return
    try:
        console.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    except Exception as error:  # what prints in colours is imported for it, where there is memory
        if not is_shortage(error):
            raise
        os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))


def _drop_stdout() -> None:
    """What is still buffered for a standard output that takes nothing would raise again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(error: QuantloadError) -> int:
    if isinstance(error, MemoryBudgetError) or shortage_behind(error) is not None:
        return EXIT_BUDGET
    if isinstance(error, (CheckpointError, RouteError, UnsupportedCheckpointError)):
        return EXIT_CHECKPOINT
    return EXIT_USAGE if isinstance(error, PolicyError) else EXIT_OTHER


def _fit(model: str | None, chosen: PlanOptions, arguments: dict[str, Any]) -> Fitted | None:
    """What `--fit` chooses, which becomes the policy in `arguments`, and is logged."""
    if chosen.fit is None:
        return None
    if arguments["quantization"] != "auto":
        raise PolicyError("--fit chooses the schemes: leave --quantization out")
    if launched().ranks > 1:
        raise PolicyError("--fit is for one process: plan with it alone, --save-policy, and give ranks --policy")
    with _libraries():
        from .fit_policy import fit_policy

    taken = ("device", "policy", "options", "revision", "trust_remote_code")
    found = fit_policy(_model(model, chosen.source), chosen.fit, **{name: arguments[name] for name in taken})
    arguments["policy"] = found.policy
    for line in found.lines():
        logger.info("%s", line)
    return found


def _model(model: str | None, source: SourceOptions) -> str | Path:
    revision = source.revision
    if model is None and revision is not None:
        raise PolicyError(
            f"--revision {revision} is given without MODEL, and the bundled demo model has no revisions: name the hub "
            f"id it is of"
        )
    if model is None and source.stream:
        raise PolicyError("--stream is given without MODEL: name the hub id")
    return DEMO_MODEL if model is None else source.address(model)


def _display_name(model: str | None) -> str:
    return "quantload-demo" if model is None else model


def _writable(path: Path | None, option: str = "--report") -> Path | None:
    """The file for a report; raises before a load whose report could not be written after it."""
    if path is None:
        return None
    path = local_path(path, option, PolicyError)
    path = Path(os.path.realpath(path))  # a link is left where it leads nowhere
    place = path if path.exists() else path.parent
    if path.is_symlink() or path.is_dir() or not path.parent.is_dir() or not os.access(place, os.W_OK):
        raise PolicyError(f"{path} cannot be written: give {option} a file in a folder that you may write to")
    return path


def _tell(report: Any, path: Path | None, as_json: bool) -> None:
    """Write a report where it was asked for, and show it."""
    if path is not None:
        try:
            report.save(path)
        except OSError as error:
            raise QuantloadError(f"{path} cannot be written: {error.strerror}; all the rest was done") from error
    _show(report, as_json)


def _show(report: Any, as_json: bool) -> None:
    from .memory.summary import render

    if as_json:
        _print_json(report.to_dict())
    else:
        with _to_stdout():
            render(report, _tables())


def _tables() -> Console:
    """Standard output, as wide as the terminal; where there is none, as wide as any table: nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else _NO_TERMINAL_WIDTH)


def _print_json(value: dict[str, Any]) -> None:
    with _to_stdout():
        print(json.dumps(value, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
