"""What a stage found so far, as a JSON file that is whole at every moment."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Record:
    """A dict and the file it is kept in; what an earlier process of the stage left there is taken over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def write(self) -> None:
        """Put the dict into the file, all of it or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(finite(self.values), indent=1, allow_nan=False)
        beside = self.path.with_suffix(".part")
        beside.write_text(text + "\n")
        os.replace(beside, self.path)


def finite(value: Any) -> Any:
    """The same with words for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = (str(error).strip() or "no message").splitlines()
    return f"{type(error).__name__}: {lines[0][:400]}"


class DeviceLost(BaseException):
    """Nothing more can be run in this process; no `Exception`, so that what goes on after a failure lets it through."""


def check_device(device: torch.device) -> None:
    """Raise `DeviceLost` where the device does not even wait any more: a fault in a kernel ends all that follows."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(first_line(error)) from error


class Steps:
    """Steps of a stage one after the other, none of which ends the next; those that an earlier process tried are left.

    `record.values` gets each `part` (a list of what steps return), `failures` [{what, why}] and `not reached`.
    """

    def __init__(self, record: Record, device: torch.device, until: float, *parts: str) -> None:
        self.record, self.device, self.until = record, device, until
        values = record.values
        for name in (*parts, "failures", "tried"):
            values.setdefault(name, [])
        values["not reached"] = []
        values.pop("error", None)
        if "now" in values:
            self.fails(values.pop("now"), "the process ended or was ended in the middle of it")
        record.write()

    def fails(self, what: str, why: str) -> None:
        """Note a failure."""
        self.record.values["failures"].append({"what": what, "why": why})

    def attempt(self, what: str, function: Callable[[], Any]) -> Any:
        """What a part of a step returns, or None where it fails, which is noted."""
        try:
            return function()
        except Exception as error:
            self.fails(what, first_line(error))
            check_device(self.device)
            return None

    def step(self, part: str, what: str, function: Callable[[], Any]) -> None:
        """Take a step, and write down what it returns, unless the time is up or it was taken before."""
        values = self.record.values
        if what in values["tried"]:
            return
        if time.time() > self.until:
            values["not reached"].append(what)
            return
        values["tried"].append(what)
        values["now"] = what
        self.record.write()
        try:
            found = self.attempt(what, function)
            values[part] += found if isinstance(found, list) else [found] if found is not None else []
            check_device(self.device)
        except DeviceLost as error:
            self.fails(what, f"the device is lost: {error}")
            raise
        finally:
            values.pop("now", None)
            self.record.write()
