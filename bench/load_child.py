"""One load in a process of its own: started by `bench/load.py`, which samples this process's memory meanwhile.

    python bench/load_child.py LOADER FOLDER [--warm-up FOLDER] [--no-generate]

Events are JSON lines on stdout: `ready` (then it waits for a line on stdin), `loaded`, `measured`, `generated`, or
`missing` / `failed`. Whatever the libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from checkpoints import tensor_shapes
from loaders import LOADERS, Load, Loader
from machine import library_versions

NEW_TOKENS = 8
QUANTIZED_BELOW = 0.75  # stored bytes of a weight, relative to BF16, under which it counts as quantized
REPORT_FIELDS = (
    "seconds",
    "bytes_read",
    "checkpoint_bytes",
    "final_bytes",
    "peak_bytes",
    "staging_peak_bytes",
    "baseline_bytes",
    "predicted_final_bytes",
    "predicted_peak_bytes",
    "fallback_conversions",
)


class Events:
    """Writes the events to the stdout this process was started with; from then on stdout is stderr."""

    def __init__(self) -> None:
        self._stream: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, event: str, **fields: Any) -> None:
        self._stream.write(json.dumps({"event": event, **fields}) + "\n")


def process_memory() -> dict[str, int]:
    """`anon`, `file`, `total` and `peak_total` resident bytes of this process."""
    names = {"RssAnon": "anon", "RssFile": "file", "VmRSS": "total", "VmHWM": "peak_total"}
    found: dict[str, int] = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in names:
            found[names[key]] = int(value.split()[0]) * 1024
    return found


def mapped_checkpoint_bytes(folder: Path) -> int:
    """Resident bytes of this process's mappings of files in `folder`."""
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            inside = rest.rsplit(" ", 1)[-1].startswith(str(folder))
        elif inside and first == "Rss:":
            resident += int(rest.split()[0]) * 1024
    return resident


def inner_tensors(tensor: Any) -> Iterator[Any]:
    """The plain tensors that hold a parameter's bytes: itself, or what a quantizing subclass wraps."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from inner_tensors(getattr(tensor, name))
        return
    yield tensor
    for attribute in ("CB", "SCB"):  # bitsandbytes hangs codes and scales on the parameter object
        extra = getattr(tensor, attribute, None)
        if extra is not None:
            yield extra
    yield from _quant_state_tensors(getattr(tensor, "quant_state", None))


def _quant_state_tensors(state: Any) -> Iterator[Any]:
    if state is None:
        return
    for attribute in ("absmax", "code", "offset"):
        extra = getattr(state, attribute, None)
        if hasattr(extra, "untyped_storage"):
            yield extra
    yield from _quant_state_tensors(getattr(state, "state2", None))


def storage_bytes(tensors: Iterator[Any]) -> int:
    """Bytes of the distinct storages under `tensors`."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        for inner in inner_tensors(tensor):
            storage = inner.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _quantizable(folder: Path) -> dict[tuple[str, str, str], int]:
    """Elements of every weight that ought to be quantized, by kind, module path and parameter name."""
    found: dict[tuple[str, str, str], int] = {}
    for name, shape in tensor_shapes(folder).items():
        if not name.endswith("_proj.weight"):
            continue
        key = ("linear", name.removesuffix(".weight"), "weight")
        if ".experts." in name:
            path = name[: name.index(".experts.") + len(".experts")]
            key = ("expert", path, "down_proj" if name.endswith(".down_proj.weight") else "gate_up_proj")
        found[key] = found.get(key, 0) + math.prod(shape)
    return found


def quantized_shares(model: Any, folder: Path) -> dict[str, float | None]:
    """Share of the linear and of the expert parameters whose stored bytes show that they are quantized."""
    total = {"linear": 0, "expert": 0}
    done = {"linear": 0, "expert": 0}
    for (kind, path, parameter), elements in _quantizable(folder).items():
        stored = storage_bytes(iter([getattr(model.get_submodule(path), parameter)]))
        total[kind] += elements
        if stored < QUANTIZED_BELOW * 2 * elements:
            done[kind] += elements
    return {kind: done[kind] / count if count else None for kind, count in total.items()}


def _generate(model: Any) -> list[int]:
    torch = importlib.import_module("torch")
    prompt = torch.arange(3, 11)[None]
    out = model.generate(
        prompt,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    if not all(bool(torch.isfinite(logits).all()) for logits in out.logits):
        raise ValueError("the logits are not finite")
    tokens: list[int] = out.sequences[0, prompt.shape[1] :].tolist()
    if len(tokens) != NEW_TOKENS:
        raise ValueError(f"{len(tokens)} tokens came out, not {NEW_TOKENS}")
    return tokens


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def generate(model: Any) -> dict[str, Any]:
    """Whether the model continues a prompt by eight tokens, and how, with what went wrong where it does not."""
    start = time.perf_counter()
    problems: list[str] = []
    for implementation in ("default", "eager"):
        try:
            if implementation == "eager":
                model.set_experts_implementation("eager")  # most tensor subclasses lack the grouped product
            tokens = _generate(model)
        except Exception as error:
            traceback.print_exc()
            problems.append(f"{implementation}: {_first_line(error)}")
            continue
        seconds = time.perf_counter() - start
        return {"ok": True, "tokens": tokens, "seconds": seconds, "experts": implementation, "problems": problems}
    return {"ok": False, "problems": problems}


def _import_model_class(folder: Path) -> None:
    transformers = importlib.import_module("transformers")
    for name in json.loads((folder / "config.json").read_text())["architectures"]:
        getattr(transformers, name)


def prepare(loader: Loader, folder: Path, warm_up: Path | None) -> tuple[Load, dict[str, Any]]:
    """Do every import; with `warm_up`, load that small checkpoint too, so that code compiled on first use is there."""
    start = time.perf_counter()
    load = loader.build()
    if loader.family != "floor":
        _import_model_class(folder)
    facts: dict[str, Any] = {"import_seconds": time.perf_counter() - start}
    if warm_up is not None:
        gc.collect()
        before = process_memory()["anon"]
        start = time.perf_counter()
        load(warm_up)
        facts["warm_up_seconds"] = time.perf_counter() - start
        gc.collect()
        facts["warm_up_anon"] = process_memory()["anon"] - before
    gc.collect()
    return load, facts


def measure(model: Any, folder: Path, baseline: dict[str, int]) -> dict[str, Any]:
    """Everything the table says about a loaded model but its time; memory is over `baseline`, in bytes."""
    after = process_memory()
    facts: dict[str, Any] = {
        "peak_total": after["peak_total"] - baseline["total"],
        "anon_after": after["anon"] - baseline["anon"],
        "file_after": after["file"] - baseline["file"],
        "checkpoint_pages_after": mapped_checkpoint_bytes(folder),
    }
    if model is not None:
        tensors = [*model.parameters(), *model.buffers()]
        facts["final_bytes"] = storage_bytes(iter(tensors))
        facts["quantized"] = quantized_shares(model, folder)
        report = getattr(model, "load_report", None)
        if report is not None:
            values = report.to_dict()
            facts["report"] = {name: values[name] for name in REPORT_FIELDS if name in values}
            facts["layers_quantized"] = len(values["layers"])
    return facts


def _spent(before: resource.struct_rusage) -> dict[str, float]:
    """Processor time and page faults of this process since `before`: tells a busy machine from a slow loader."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "user_seconds": now.ru_utime - before.ru_utime,
        "system_seconds": now.ru_stime - before.ru_stime,
        "page_faults": now.ru_minflt - before.ru_minflt,
    }


def run(events: Events, loader: Loader, folder: Path, warm_up: Path | None, with_generate: bool) -> None:
    """The whole life of this process, told in events."""
    phase = "import"
    try:
        load, facts = prepare(loader, folder, warm_up)
        phase = "load"
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of VmRSS
        baseline = process_memory()
        events.send("ready", versions=library_versions(), baseline=baseline, **facts)
        sys.stdin.readline()
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        model = load(folder)
        seconds = time.perf_counter() - start
        events.send("loaded", seconds=seconds, **_spent(before))
        phase = "measure"
        events.send("measured", **measure(model, folder, baseline))
        if with_generate and model is not None:
            phase = "generate"
            events.send("generated", **generate(model))
    except Exception as error:
        traceback.print_exc()
        events.send("failed", phase=phase, error=_first_line(error))


def main() -> None:
    """Parse the command line that `bench/load.py` makes, and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("loader", choices=sorted(LOADERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--warm-up", type=Path, default=None)
    parser.add_argument("--no-generate", action="store_true")
    options = parser.parse_args()
    events = Events()
    loader = LOADERS[options.loader]
    missing = loader.missing()
    if missing:
        events.send("missing", modules=missing)
        return
    run(events, loader, options.folder.resolve(), options.warm_up, not options.no_generate)


if __name__ == "__main__":
    main()
