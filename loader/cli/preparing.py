"""What every command does before it does its own: names, files, libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..addresses import shown_address
from ..collector import collector_paused
from ..errors import PolicyError
from ..interrupts import interrupt_held
from ..local_paths import local_path
from ..ranks.launch import launched
from ..shortage import importing
from .model_options import SourceOptions
from .options import ConvertOptions, PlanOptions

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint
    from ..options import LoadOptions

LoadFormat = Annotated[
    Literal["auto", "dummy"],
    typer.Option(
        help="Where weights come from; dummy: random numbers, without reading any, for planning and benchmarks. A "
        "config.json is enough then."
    ),
]
LIBRARIES = "the libraries that are imported first: torch, transformers, numba"
ROOM_FOR_LIBRARIES = 1088 << 20
"""Bytes of address space that they need in builds for CPUs, which are the smallest; some of them end the process, or
crash it, where they find less."""
DEMO_MODEL = Path(__file__).parent.parent / "demo_model"


def weights_kind(load_format: str) -> Literal["checkpoint", "dummy"]:
    return "dummy" if load_format == "dummy" else "checkpoint"


@contextmanager
def libraries() -> Iterator[None]:
    """Import what a command is made of inside. Raises `MemoryBudgetError` where there is no memory for it.

    Ctrl-C waits for the end: torch imports numpy in C++, swallows an interrupt of that and goes on with half of it.
    Python's collector stays out of the way: it would walk hundreds of thousands of new objects again and again.
    """
    from ..memory.limits import check_room

    if "torch" not in sys.modules:
        check_room(ROOM_FOR_LIBRARIES, LIBRARIES)
    with interrupt_held(), importing(LIBRARIES), collector_paused():
        yield


@contextmanager
def libraries_while_reading(model: str | Path | Checkpoint, load_format: str, options: LoadOptions) -> Iterator[None]:
    """`libraries`, and meanwhile the kernel reads weights that the load will read, where they are in a folder here.

    It reads a quarter at most of the memory that is free, and nothing where the process is limited in what it may map.
    """
    from ..checkpoint.folder import Checkpoint

    with ExitStack() as meanwhile:
        if isinstance(model, Checkpoint) and load_format != "dummy" and options.cache is None:
            from ..checkpoint.bringing_in import bringing_in
            from ..memory.limits import memory_limits

            limits = memory_limits()
            room = 0 if any(limit.is_virtual for limit in limits) else min(limit.available for limit in limits)
            meanwhile.enter_context(bringing_in(model, room // 4))
        meanwhile.enter_context(libraries())
        yield


def sensitivity_measured(model: str | None, chosen: ConvertOptions | PlanOptions, arguments: dict[str, Any]) -> None:
    """Put into the options what --sensitivity asks for."""
    text = chosen.fitting.sensitivity
    if text is None:
        return
    if launched().ranks > 1:
        raise PolicyError("--sensitivity is for one process: plan with it, --save-policy, and give ranks --policy")
    with libraries():
        from ..fit.sensitivity import measure_sensitivity

    found = measure_sensitivity(
        *(model_address(model, chosen.source), text), each=chosen.fitting.sensitivity_each,
        device=arguments.get("device", "cpu"), progress=chosen.logs.progress(), **chosen.source.values(),
    )  # fmt: skip
    arguments["options"] = replace(arguments["options"], fit_sensitivity=found)


def found_here(model: str | None, source: SourceOptions) -> str | Path | Checkpoint:
    """The checkpoint in a folder here, looked at before anything is imported; the address of what is elsewhere.

    Raises `CheckpointError` for what is neither, and for a folder without a config.
    """
    address = model_address(model, source)
    if launched().ranks > 1:
        return address  # ranks tell each other of errors, once they have a process group
    from ..checkpoint.folder import resolve_folder

    here = resolve_folder(address, source.revision)
    if here is None:
        return address
    here.config()
    return here


def model_address(model: str | None, source: SourceOptions) -> str | Path:
    revision = source.revision
    if model is None and revision is not None:
        raise PolicyError(
            f"--revision {revision} is given without MODEL, and the bundled demo model has no revisions: name the hub "
            f"id it is of"
        )
    if model is None and source.stream:
        raise PolicyError("--stream is given without MODEL: name the hub id")
    return DEMO_MODEL if model is None else source.address(model)


def display_name(model: str | None) -> str:
    return "quantload-demo" if model is None else shown_address(model)


def writable(path: Path | None, option: str = "--report") -> Path | None:
    """The file for a report; raises before a load whose report could not be written after it."""
    if path is None:
        return None
    path = local_path(path, option, PolicyError)
    path = Path(os.path.realpath(path))  # a link is left where it leads nowhere
    why = _why_not(path)
    if why:
        raise PolicyError(f"{path} cannot be written: {why}; give {option} a file in a folder that you may write to")
    return path


def _why_not(path: Path) -> str:
    """Why a file cannot be written; nothing where it can."""
    if path.is_symlink():
        return "it is a link that leads nowhere"
    if path.is_dir():
        return "it is a folder"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return "" if os.access(path if path.exists() else path.parent, os.W_OK) else "you may not write there"
