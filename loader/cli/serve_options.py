"""What `serve` takes beside what a load takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from .preparing import LoadFormat

RequestLogMode = Literal["all", "no-probes", "off"]  # as in server/request_log.py, which needs the extra to be imported
LayerMetrics = Literal["auto", "on", "off"]  # as in memory/metrics.py


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How the API is served, and the load before it."""

    host: Annotated[
        str, typer.Option(help="Address to listen on; any but a local one can be reached from other machines.")
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one, which the log names.", min=0, max=65535)
    ] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Bearer token that every request but /health must carry. Other users see it in the process list: give "
            "it as QUANTLOAD_API_KEY, or in a file.",
            show_default="no key is asked for",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the API key and nothing else.", show_default="no file"),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Host name that requests may be for, also *.NAME, or * for any. Repeatable.",
            show_default="any; on a local address the names of this machine alone",
        ),
    ] = None
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model in the API.", show_default="MODEL as given")
    ] = None
    continuous_batching: Annotated[
        bool | None,
        typer.Option(
            "--continuous-batching/--no-continuous-batching",
            help="Generate for requests together, with transformers' paged scheduler, or one after the other.",
            show_default="together on a CPU, where the model allows it; the log says why not",
        ),
    ] = None
    max_queue: Annotated[
        int,
        typer.Option(
            metavar="NUMBER", help="Requests that may wait for their turn; others are told to come back later.", min=0
        ),
    ] = 256
    request_log: Annotated[
        RequestLogMode, typer.Option(help="Requests that are logged, a line each; probes are /health and /metrics.")
    ] = "all"
    layer_metrics: Annotated[
        LayerMetrics,
        typer.Option(help="Show gauges for each layer in /metrics; auto: for models of up to 512 quantized layers."),
    ] = "auto"
    load_format: LoadFormat = "auto"
    reload_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Let POST /reload exchange the weights for those of a checkpoint below this folder; with an API key.",
            show_default="it does not",
        ),
    ] = None
    weight_updates: Annotated[
        bool,
        typer.Option("--weight-updates", help="Let trainers send new weights over HTTP; with an API key."),
    ] = False
