"""The `quantload` command: thin, every subcommand one call into the package."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from ..errors import PolicyError, QuantloadError
from ..interrupts import interrupt_first
from ..local_paths import local_path
from ..ranks.launch import launched, process_group
from ..schemes.names import ExportName
from ..shortage import is_shortage
from ..threads import settle_threads
from .compare import compare
from .evaluate import evaluate
from .exit_codes import EXIT_BUDGET, EXIT_INTERRUPTED, EXIT_OTHER, exit_code
from .failing import drop_stdout, fails_as_json, failure_written, print_error, print_interrupted
from .generate import generate
from .groups import command_with_groups
from .logs import set_up_logging
from .options import ConvertOptions, Html, Json, Model, ModelOptions, PlanOptions, Report
from .output import print_json, show, tables, tell, to_stdout
from .pages import typed, write_report_page
from .preparing import DEMO_MODEL as DEMO_MODEL
from .preparing import (
    LoadFormat,
    found_here,
    libraries,
    libraries_while_reading,
    sensitivity_measured,
    weights_kind,
    writable,
)
from .serve import serve
from .variables import warn_of_misspelt

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
    "Exit codes: 0; 2 usage; 3 bad checkpoint; 4 out of budget; 1 other; 130 interrupted."
)
def about(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Stream a checkpoint straight into a quantized model."""
    warn_of_misspelt(getattr(context.command, "commands", {}).values())


@app.command()
@command_with_groups
@fails_as_json
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
    report, html = writable(report), writable(html, "--html")
    if html is not None and html == report:
        raise PolicyError(f"--report and --html are one file, {html}: give each its own")
    page = html if launched().rank == 0 else None
    with failure_written(page, model or DEMO_MODEL, chosen.quantization, chosen.device):
        arguments = chosen.arguments()
        given = found_here(model, chosen.source)
        sensitivity_measured(model, chosen, arguments)
        with libraries_while_reading(given, load_format, arguments["options"]):
            from ..load import load_quantized

        with process_group(arguments["device"]):
            weights, progress = weights_kind(load_format), chosen.logs.progress()
            done = load_quantized(given, progress=progress, weights=weights, **arguments).load_report
    done.command = typed()
    if launched().rank == 0:
        write_report_page(done.to_dict(), html)
        tell(done, report, as_json)


@app.command()
@command_with_groups
@fails_as_json
def plan(
    *,
    model: Model = None,
    chosen: PlanOptions,
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
    arguments, save_policy = chosen.arguments(), writable(save_policy, "--save-policy")
    given = found_here(model, chosen.source)
    sensitivity_measured(model, chosen, arguments)
    with libraries():
        from ..fit.check import beside_peak, judge_draft
        from ..fit.warning import scheme_warning
        from ..planning import plan_fitted

    draft, fitted = plan_fitted(given, **arguments)
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
        "beside_the_peak": beside_peak(draft, chosen.fitting.context, chosen.fitting.requests or 1).to_dict(),
        "fit": None if fitted is None else fitted.to_dict(),
        "scheme_warning": scheme_warning(draft),
    }
    if save_policy is not None:
        save_policy.write_text(json.dumps(asdict(draft.rules.policy), indent=1) + "\n")
    if as_json:
        print_json(summary)
    else:
        from ..memory.summary import print_plan

        with to_stdout():
            print_plan(summary, draft.plan.memory, tables())
    if verdict.state == "does not fit" and not options.force:
        raise typer.Exit(EXIT_BUDGET)


app.command()(compare)
app.command("eval")(evaluate)
app.command()(serve)
app.command()(generate)


@app.command()
@command_with_groups
@fails_as_json
def convert(
    *,
    model: Annotated[str, typer.Argument(help="Folder, hub id or URL of a checkpoint.")],
    out: Annotated[str, typer.Argument(help="Folder to write, or its URL in an object store; it must not exist.")],
    checkpoint_format: Annotated[
        ExportName,
        typer.Option(
            "--format",
            help="Whose form of a checkpoint; modelopt is for nvfp4, mxfp4 that of gpt-oss, quantload for nl4 and all "
            "others, read by quantload alone.",
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
    report = writable(report)
    given = found_here(model, chosen.source)
    sensitivity_measured(model, chosen, arguments)
    with libraries_while_reading(given, "auto", arguments["options"]):
        from ..convert.flow import convert_checkpoint

    made = convert_checkpoint(
        given, out, format=checkpoint_format, max_shard_bytes=max_shard_size,
        progress=chosen.logs.progress(), model_card=not no_model_card, **arguments,
    )  # fmt: skip
    tell(made, report, as_json)


@app.command()
@fails_as_json
def schemes(
    device: Annotated[
        str, typer.Option(help="Device to choose kernels for: cpu, or a torch device such as cuda.")
    ] = "cpu",
    as_json: Json = False,
) -> None:
    """Say what there is for each scheme and format: layers, checkpoints read and written, activations, kernels."""
    with libraries():
        from ..schemes.listing import list_read_only, list_schemes, print_schemes

    if as_json:
        print_json({"device": device, "schemes": list_schemes(device), "read_only": list_read_only()})
    else:
        with to_stdout():
            print_schemes(device, tables())


@app.command()
@fails_as_json
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
    from ..memory.report import LoadReport

    html = writable(html, "--html")
    try:
        saved = LoadReport.load(local_path(path, "PATH", PolicyError))
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror}") from error
    write_report_page(saved.to_dict(), html)
    if html is None or as_json:
        show(saved, as_json)


def main() -> None:
    """Run the command line; exit codes: 0, 2 usage, 3 bad checkpoint, 4 out of budget, 1 other, 130 interrupted."""
    set_up_logging()
    settle_threads()
    try:
        with interrupt_first():
            app()
    except KeyboardInterrupt as error:
        print_interrupted()
        sys.exit(exit_code(error))
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:  # typer makes that of a KeyboardInterrupt, without a word
            print_interrupted()
        raise
    except BrokenPipeError:
        drop_stdout()
        sys.exit(EXIT_OTHER)
    except Exception as error:
        if not isinstance(error, (QuantloadError, OSError)) and not is_shortage(error):
            raise
        if isinstance(error, OSError) and not is_shortage(error):
            drop_stdout()
        print_error(error)
        sys.exit(exit_code(error))
