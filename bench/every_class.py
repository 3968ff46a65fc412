"""Whether every model class of transformers answers as its dequantized self, whatever the scheme.

Each class is shrunk, given random weights and saved; quantload loads that checkpoint, and transformers loads it too,
whereupon the quantized weights of the first take their place in the second. Then nothing may differ: every kept
parameter and every buffer to the bit and in its dtype, `dtype` of the model and of its parts, and every tensor of a
forward, up to the order of sums (in float32; in BF16 only dtypes and shapes are compared, and large differences). A
process of its own, with a limit of time and memory, for each class; what transformers itself cannot build or run here
is counted as that.

    python bench/every_class.py                     # all classes, quark_mxfp4
    python bench/every_class.py --schemes fp8_per_channel int8_per_channel --only siglip
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from compared_models import FAULTS, TOLERANCE, differs, outputs
from machine import describe_machine, headline
from result_files import RESULTS, write_result
from shrunk_models import ModelClass, best_of, built, candidate_inputs, model_classes, shrunk_configs
from transformers import PreTrainedModel

SECONDS = 90
MEMORY = 6 << 30
NOT_BUILT = "not built here"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["quark_mxfp4"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="a regular expression that class names match")
    parser.add_argument("--one-a-type", action="store_true", help="one class a type of config: the fullest")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    machine = describe_machine()
    print(headline(machine), flush=True)
    classes = model_classes(given.only)
    if given.one_a_type:
        classes = [best_of(list(those)) for _, those in itertools.groupby(classes, lambda each: each.model_type)]
    for module in ("draft", "load", "model.skeleton", "schemes.registry", "online.moe", "memory.report"):
        importlib.import_module(f"quantload.{module}")  # once, instead of in each process
    cases = [(each, given.schemes, given.dtypes) for each in classes]
    rows = []
    for number, found in enumerate(_results(cases, given.processes), 1):
        rows += found
        for row in found:
            if row["result"] in FAULTS:
                about = f"{row['class']} {row['scheme']} {row['dtype']}"
                print(f"{number}/{len(cases)} {about}: {row['result']}: {row['detail']}", flush=True)
    counts = Counter((row["scheme"], row["dtype"], row["result"]) for row in rows)
    for (scheme, dtype, result), count in sorted(counts.items()):
        print(f"{scheme:24} {dtype:10} {result:16} {count:5}")
    reduced = f"only-{given.only}" if given.only else "one-a-type" if given.one_a_type else ""
    tolerance = {str(dtype): value for dtype, value in TOLERANCE.items()}
    settings = {"schemes": given.schemes, "dtypes": given.dtypes, "tolerance": tolerance}
    result = {"machine": machine, "settings": settings, "rows": rows}
    path = write_result("every_class", result, given.out, re.sub(r"\W+", "-", reduced).strip("-"))
    print(path)
    return int(any(row["result"] in FAULTS for row in rows))


def _results(cases: list[tuple[ModelClass, list[str], list[str]]], processes: int) -> Iterator[list[dict[str, Any]]]:
    """Of each case, in the order they end; each runs in a process forked from this one, which has the libraries."""
    waiting = list(reversed(cases))
    running: dict[int, tuple[Any, Any, ModelClass, float]] = {}
    context = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < processes:
            case = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sender, *case))
            process.start()
            sender.close()
            running[process.pid or 0] = (process, receiver, case[0], time.monotonic())
        for pid, (process, receiver, model, since) in list(running.items()):
            limit = SECONDS * len(cases[0][1]) * len(cases[0][2])
            if receiver.poll(0.02) or not process.is_alive() or time.monotonic() - since > limit:
                del running[pid]
                yield _ended(process, receiver, model)


def _ended(process: Any, receiver: Any, model: ModelClass) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if receiver.poll():
        with contextlib.suppress(EOFError):
            rows = json.loads(receiver.recv_bytes())
    if process.is_alive() and not rows:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return rows or [_row(model, "", "", "crashed", f"exit code {process.exitcode}")]


def _row(model: ModelClass, scheme: str, dtype: str, result: str, detail: str = "") -> dict[str, Any]:
    return {"class": model.class_name, "scheme": scheme, "dtype": dtype, "result": result, "detail": detail[:400]}


def _child(sender: Any, model: ModelClass, schemes: list[str], dtypes: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    rows = []
    for dtype in dtypes:
        try:
            rows += list(_compared(model, schemes, getattr(torch, dtype)))
        except Exception:
            rows.append(_row(model, "", dtype, "crashed", traceback.format_exc()[-400:]))
    sender.send_bytes(json.dumps(rows).encode())


def _compared(model: ModelClass, schemes: list[str], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """One row a scheme: the twin of the first config that builds and runs, else of the first that builds."""
    quantload = importlib.import_module("quantload")
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        twin, inputs, why = _twin(model, dtype, Path(folder))
        if twin is None:
            yield from (_row(model, scheme, name, NOT_BUILT, why) for scheme in schemes)
            return
        for scheme in schemes:
            twin = model.cls.from_pretrained(folder, dtype="auto").eval()  # anew: a forward may have changed it
            try:
                loaded = quantload.load_quantized(folder, scheme).eval()
            except Exception as error:
                result, detail = "load refused", f"{type(error).__name__}: {error}"
            else:
                result, detail = differs(loaded, twin, inputs, dtype)
            yield _row(model, scheme, name, result, detail)


def _twin(
    model: ModelClass, dtype: torch.dtype, folder: Path
) -> tuple[PreTrainedModel | None, dict[str, Any] | None, str]:
    """What transformers loads from the checkpoint that is left in `folder`, and inputs that it takes."""
    why, fallback = "no config", None
    for config in shrunk_configs(model):
        try:
            built(model, config, dtype).save_pretrained(folder)
            twin: PreTrainedModel = model.cls.from_pretrained(folder, dtype="auto").eval()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            continue
        for inputs in candidate_inputs(twin):
            try:
                outputs(twin, inputs)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                continue
            return twin, inputs, ""
        if fallback is not None:
            break
        fallback = config
    if fallback is None:
        return None, None, why
    built(model, fallback, dtype).save_pretrained(folder)
    return model.cls.from_pretrained(folder, dtype="auto").eval(), None, why


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    sys.exit(main())
