"""How a command ends that failed: what it says on standard error, as JSON on standard output, and in a page."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from ..addresses import shown_address
from ..errors import QuantloadError
from ..page.advice import advice_for, advised, class_names
from ..ranks.launch import launched
from ..shortage import is_shortage, refused
from .exit_codes import exit_code
from .logs import console, log_as_json
from .pages import typed, write_page
from .variables import PREFIX


def given_options() -> list[str]:
    """The options that were given, on the command line by their long names or by the environment."""
    typed_ones = {argument.partition("=")[0] for argument in sys.argv[1:] if argument.startswith("--")}
    variables = (name.removeprefix(PREFIX) for name in os.environ if name.startswith(PREFIX))
    return sorted(typed_ones | {f"--{name.lower().replace('_', '-')}" for name in variables})


@contextmanager
def failure_written(path: Path | None, model: str | Path, quantization: str, device: str) -> Iterator[None]:
    """Write the page of a load that fails inside, unless `path` is None; the error goes on its way."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if path is not None:
            from ..memory.attempt import describe_failure
            from ..page.failure import failure_page

            said = describe_failure(
                error, model=shown_address(str(model)), quantization=quantization, device=str(device),
                command=typed(), options=given_options(),
            )  # fmt: skip
            write_page(failure_page(said), path)
        raise


def fails_as_json(command: Callable[..., None]) -> Callable[..., None]:
    """A command that, with `as_json`, prints what it fails with as a JSON object; the error goes on its way."""

    @functools.wraps(command)
    def told(**given: Any) -> None:
        try:
            command(**given)
        except typer.Exit:  # all is said
            raise
        except (Exception, KeyboardInterrupt) as error:
            is_of_output = isinstance(error, BrokenPipeError) or getattr(error, "filename", None) == "standard output"
            if given["as_json"] and launched().rank == 0 and not is_of_output:
                with suppress(OSError):  # the error is on its way to standard error, and is not to be lost
                    print(json.dumps({"error": described(error)}), flush=True)
            raise

    return told


def described(error: BaseException) -> dict[str, Any]:
    """An error for a program: its class and those it is a kind of, the message, what to do, the exit code."""
    error = _named(error)
    names = class_names(error)
    advice = advice_for(names)
    return {
        "type": names[0],
        "types": names,
        "message": _message(error),
        "means": advice.means,
        "remedy": advice.steps_for(given_options()),
        "exit_code": exit_code(error),
    }


def print_error(error: BaseException) -> None:
    """Say on standard error what ended a command, with the class that docs/troubleshooting.md has it under."""
    error = _named(error)
    message, kind = _message(error), advised(class_names(error))
    if log_as_json():
        logging.getLogger("quantload").error(message, extra={"fields": {"error": kind}})
        return
    shown = f"error: {message} [{kind}]"
    try:
        console.print(shown, style="red", highlight=False, markup=False, soft_wrap=True)
    except Exception as problem:  # what prints in colours is imported for it, where there is memory
        if not is_shortage(problem):
            raise
        os.write(2, f"{shown}\n".encode(errors="backslashreplace"))


def print_interrupted() -> None:
    """Say on standard error that Ctrl-C ended a command."""
    if log_as_json():
        logging.getLogger("quantload").error("interrupted", extra={"fields": {"error": "KeyboardInterrupt"}})
        return
    console.print("interrupted", style="red")


def drop_stdout() -> None:
    """What is still buffered for a standard output that takes nothing would raise again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _named(error: BaseException) -> BaseException:
    """A refusal of the system as the error it is here; others as they are."""
    is_refusal = isinstance(error, Exception) and not isinstance(error, QuantloadError) and is_shortage(error)
    return refused("the program itself", error) if is_refusal else error


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    return str(error)
