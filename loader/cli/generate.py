"""`quantload generate`: load a model and answer one prompt."""

from __future__ import annotations

import logging
import secrets
import sys
from typing import Annotated, Any

import typer

from ..ranks.launch import launched, of_first, process_group
from ..threads import settle_threads
from .failing import fails_as_json
from .groups import command_with_groups
from .options import Json, Model, ModelOptions
from .output import print_json, to_stdout
from .preparing import LoadFormat, found_here, libraries_while_reading, sensitivity_measured, weights_kind

SEED_BITS = 32
logger = logging.getLogger("quantload")


@command_with_groups
@fails_as_json
def generate(
    *,
    model: Model = None,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What to answer: the message of a user where there is a chat template.",
        ),
    ],
    raw: Annotated[
        bool, typer.Option("--raw", help="Let the model go on with the prompt as it is, without its chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            help="Most tokens to generate.",
            show_default="128, or fewer where the context of the model ends",
            min=1,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0: the most likely token, always. Above: sample; the higher, the less likely tokens come too.",
            show_default="as the model's generation config says",
            min=0.0,
            max=2.0,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Number that sampling follows from: the same one gives the same text.",
            show_default="another one each time, which --json tells",
            min=0,
            max=2**63 - 1,
        ),
    ] = None,
    load_format: LoadFormat = "auto",
    chosen: ModelOptions,
    as_json: Json = False,
) -> None:
    """Load a model and print its answer to one prompt, as it is generated."""
    chosen.logs.set_up()
    settle_threads(chosen.forward.threads)
    arguments = chosen.arguments()
    given, is_first = found_here(model, chosen.source), launched().rank == 0
    sensitivity_measured(model, chosen, arguments)
    with libraries_while_reading(given, load_format, arguments["options"]):
        from ..checkpoint.resolve import resolved
        from ..generating import answer, read_prompt
        from ..load import load_quantized

    with resolved(given, arguments.pop("revision")) as checkpoint, process_group(arguments["device"]):
        asked = read_prompt(
            checkpoint, prompt, raw=raw, max_new_tokens=max_new_tokens,
            trust_remote_code=arguments["trust_remote_code"],
        )  # fmt: skip
        loaded = load_quantized(
            checkpoint, progress=chosen.logs.progress(), weights=weights_kind(load_format), **arguments
        )
        seed = of_first(secrets.randbits(SEED_BITS) if seed is None else seed)
        told = answer(
            loaded, asked, temperature=temperature, seed=seed, on_text=_show if is_first and not as_json else None
        )
    if is_first and not as_json:
        with to_stdout():
            print()
        if told.finish_reason == "length":
            logger.warning("%s", _cut_off(told.tokens, asked.room))
    elif is_first:
        print_json(_described(loaded.load_report, asked, told, seed))


def _show(text: str) -> None:
    with to_stdout():
        sys.stdout.write(text)


def _cut_off(tokens: int, room: int | None) -> str:
    """What to say of an answer that ended because of its length."""
    if room is not None and tokens >= room:
        return f"The answer ends after {tokens} tokens, where the context of the model does: shorten the prompt"
    return f"The answer was cut off after {tokens} tokens: --max-new-tokens NUMBER allows more"


def _described(report: Any, asked: Any, told: Any, seed: int) -> dict[str, Any]:
    """What --json prints."""
    return {
        "model": report.model,
        "quantization": report.quantization,
        "text": told.text,
        "finish_reason": told.finish_reason,
        "prompt_tokens": asked.ids.shape[-1],
        "tokens": told.tokens,
        "is_chat": asked.is_chat,
        "seed": seed,
        "seconds": told.seconds,
        "load_seconds": report.seconds,
        "peak_bytes": report.peak_bytes,
        "world_size": report.world_size or 1,
    }
