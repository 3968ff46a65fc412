"""Stage "right": every kernel of every format against the reference, chosen inputs first, then those of hypothesis.

A failure is told with the smallest input that hypothesis finds for it, and ends nothing else. Which input a kernel is
on is written down before it runs: a process that is ended, or that loses its device, leaves the name of the culprit,
and the next one goes on behind it.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch
from gpu_day_cases import DTYPES, Case, Target, check, targets
from gpu_day_record import DeviceLost, Record, check_device, first_line
from quantload.kernels.formats import FORMATS, INTEGERS

FIRST = ("mxfp4", "fp8_channel", "int8_channel", "nvfp4", "fp8_block", "mxfp8", "int4_group128_f16", "mxfp6_e2m3")
"""The formats that most depends on."""
INTEGERS_FIRST = ("int4_group128_f16", "int4_group32_bf16", "int8_group64_f32", "int4_group0_f32")
DRY = ("mxfp4", "nvfp4")
EXAMPLES, DRY_EXAMPLES = 25, 3
CASE_SECONDS = 60.0
"""A kernel that takes longer on one input, compiled anew, hangs, and ends the process."""
SMALLEST_SECONDS = 20.0
"""Looking for the smallest input of one failure takes no longer."""


def chosen_formats(dry: bool) -> tuple[str, ...]:
    """Of the integers that differ in bits, group and dtype, some."""
    if dry:
        return DRY
    rest = [name for name, fmt in FORMATS.items() if fmt not in INTEGERS or name in INTEGERS_FIRST]
    return tuple(dict.fromkeys((*FIRST, *rest)))


def chosen_cases(operation: str, dry: bool) -> Iterator[Case]:
    """One shape of each kind, small ones first, in all types."""
    shapes: dict[str, list[dict[str, Any]]] = {
        "quantize": [{"rows": 3, "cols": 37}, {"rows": 130, "cols": 200}, {"rows": 256, "cols": 4096},
                     {"rows": 33, "cols": 512, "exponent": -20}, {"rows": 33, "cols": 512, "exponent": 14}],
        "dequantize": [{"rows": 4, "cols": 64}, {"rows": 130, "cols": 200}, {"rows": 64, "cols": 2048}],
        "linear": [{"rows": 70, "cols": 100, "tokens": 1}, {"rows": 256, "cols": 1024, "tokens": 1},
                   {"rows": 33, "cols": 512, "tokens": 17, "bias": True}, {"rows": 384, "cols": 256, "tokens": 130}],
        "experts": [{"rows": 70, "cols": 160, "tokens": 3}, {"rows": 256, "cols": 512, "tokens": 40}],
    }  # fmt: skip
    kept = shapes[operation][:2] if dry else shapes[operation]
    for shape, dtype in itertools.product(kept, ("bfloat16", "float32") if dry else DTYPES):
        yield Case(dtype=dtype, **shape)


def drawn_cases(operation: str) -> st.SearchStrategy[Case]:
    """Any input; hypothesis makes a failing one smaller until none is smaller."""
    is_matmul = operation in ("linear", "experts")
    return st.builds(
        Case,
        rows=st.integers(1, 300),
        cols=st.integers(1, 700),
        dtype=st.sampled_from(list(DTYPES)),
        seed=st.integers(0, 1000),
        exponent=st.integers(-3, 3) if is_matmul else st.integers(-20, 14),
        tokens=st.integers(1, 130) if operation == "linear" else st.integers(1, 40) if is_matmul else st.just(0),
        bias=st.booleans() if operation == "linear" else st.just(False),
    )


class Checker:
    """Checks the targets of a share, and writes down what becomes of each."""

    def __init__(self, record: Record, device: torch.device, until: float) -> None:
        self.record, self.device, self.until = record, device, until
        self.found: dict[str, Any] = record.values.setdefault("targets", {})
        for entry in self.found.values():
            if "now" in entry:
                self._fails(entry, entry.pop("now"), "the process ended or was ended in the middle of it")
        record.write()

    def left(self) -> float:
        return self.until - time.time()

    def entry(self, target: Target) -> dict[str, Any]:
        new = {"cases": 0, "examples": 0, "worst": 0.0, "failures": []}
        entry: dict[str, Any] = self.found.setdefault(target.label, {**vars(target), **new})
        return entry

    def _fails(self, entry: dict[str, Any], case: dict[str, Any], why: str) -> None:
        entry["failures"].append({"case": case, "why": why})

    def run(self, target: Target, case: Case, entry: dict[str, Any]) -> None:
        """One check; what it raises comes through."""
        entry["now"] = case.to_dict()
        self.record.write()
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)
        try:
            worst = check(target, case, self.device)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            try:
                check_device(self.device)
            except DeviceLost:
                self._fails(entry, entry.pop("now"), first_line(error))
                self.record.write()
                raise
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            entry.pop("now", None)
        entry["worst"] = max(entry["worst"], worst)

    def chosen(self, target: Target, dry: bool) -> None:
        """All chosen inputs, unless an earlier process was here; the first failure ends it, made smaller."""
        if target.label in self.found:
            return
        entry = self.entry(target)
        for case in chosen_cases(target.operation, dry):
            if self.left() <= 0:
                entry["cut off"] = True
                break
            try:
                self.run(target, case, entry)
            except Exception as error:
                self._fails(entry, case.to_dict(), first_line(error))
                self.record.write()
                self.smaller(target, entry)
                break
            entry["cases"] += 1
        self.record.write()

    def smaller(self, target: Target, entry: dict[str, Any]) -> None:
        """Add the smallest input that fails, where hypothesis finds one."""
        end = min(self.until, time.time() + SMALLEST_SECONDS)
        found = self.drawn(target, entry, EXAMPLES, end)
        if found is not None:
            entry["failures"][-1]["smallest"], entry["failures"][-1]["smallest why"] = found

    def drawn(
        self, target: Target, entry: dict[str, Any], examples: int, end: float
    ) -> tuple[dict[str, Any], str] | None:
        """The smallest of drawn inputs that fails, and why; None where none does, or before the time is up."""
        failed: list[tuple[dict[str, Any], str]] = []

        def attempt(case: Case) -> None:
            if time.time() > end:
                return
            try:
                self.run(target, case, entry)
            except Exception as error:
                failed.append((case.to_dict(), first_line(error)))
                raise
            entry["examples"] += 1

        settings = hypothesis.settings(
            max_examples=examples, deadline=None, database=None, report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck), derandomize=False, print_blob=False,
        )  # fmt: skip
        run: Callable[[], None] = settings(hypothesis.given(drawn_cases(target.operation))(attempt))
        try:
            run()
        except Exception as error:  # hypothesis's own, where a failure did not come again: that is one, too
            if not failed:
                return {}, first_line(error)
        if not failed:
            return None
        return min(failed, key=lambda one: _size(one[0]))


def _size(case: dict[str, Any]) -> tuple[int, ...]:
    return case["rows"] * case["cols"] * max(1, case["tokens"]), abs(case["exponent"]), case["seed"]


def share_of(found: list[Target], share: str) -> list[Target]:
    """Every n-th target: `i/n`."""
    number, of = (int(part) for part in share.split("/"))
    return found[number::of]


def run(record: Record, device: torch.device, options: argparse.Namespace) -> None:
    """Chosen inputs for all, then drawn ones in turns until the time is up; dry, once."""
    until, dry, share = options.until, options.dry, options.share
    # What is wrong should be ours: neither torch's sums in BF16, nor eight processes with threads for every core.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.set_num_threads(2)
    record.values["not reached"] = []
    checker = Checker(record, device, until)
    for target in share_of(targets(device, chosen_formats(dry)), share):
        if checker.left() <= 0:
            record.values["not reached"].append(target.label)
            continue
        checker.chosen(target, dry)
    names = DRY if dry else tuple(dict.fromkeys((*chosen_formats(False), *FORMATS)))
    everything = share_of(targets(device, names), share)
    while checker.left() > 0 and everything:
        for target in everything:
            entry = checker.entry(target)
            if checker.left() <= 0 or entry["failures"]:
                continue
            found = checker.drawn(target, entry, DRY_EXAMPLES if dry else EXAMPLES, until)
            if found is not None:
                entry["failures"].append({"case": found[0], "smallest": found[0], "why": found[1]})
            record.write()
        if dry or all(checker.entry(target)["failures"] for target in everything):
            break
