"""The command that serves a model."""

from __future__ import annotations

import logging
import signal
import sys

from ..errors import PolicyError
from ..ranks.launch import process_group
from ..threads import settle_threads
from .groups import command_with_groups
from .options import Model, ModelOptions
from .preparing import display_name, found_here, libraries_while_reading, sensitivity_measured, weights_kind
from .serve_options import ServeOptions

logger = logging.getLogger("quantload")


@command_with_groups
def serve(*, model: Model = None, serving: ServeOptions, chosen: ModelOptions) -> None:
    """Load a model and serve it over an OpenAI-compatible API, with /metrics, /health and /load_report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the server takes over as soon as it listens
    chosen.logs.set_up()
    if any(argument.partition("=")[0] == "--api-key" for argument in sys.argv):
        logger.warning("Other users see --api-key in the process list; use QUANTLOAD_API_KEY or --api-key-file instead")
    settle_threads(chosen.forward.threads)
    arguments = chosen.arguments()
    given = found_here(model, chosen.source)
    try:
        with libraries_while_reading(given, serving.load_format, arguments["options"]):
            from ..server.command import serve_model
    except ImportError as error:
        raise PolicyError(f"serving needs more packages ({error.name}): pip install 'quantload[serve]'") from error
    sensitivity_measured(model, chosen, arguments)
    chosen.logs.set_up_server()
    with process_group(arguments["device"]):
        serve_model(
            given, host=serving.host, port=serving.port, api_key=serving.api_key,
            api_key_file=serving.api_key_file, allowed_hosts=serving.allowed_host or (),
            served_model_name=serving.served_model_name or display_name(model),
            continuous_batching=serving.continuous_batching, max_queue=serving.max_queue,
            request_log=serving.request_log, layer_metrics=serving.layer_metrics, reload_root=serving.reload_root,
            weight_updates=serving.weight_updates, weights=weights_kind(serving.load_format), **arguments,
        )  # fmt: skip
