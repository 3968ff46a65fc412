"""Runs the stages of `gpu_day.py`: a process each, with limits of time, begun again where one lost its device."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_day_record import Record
from gpu_day_stages import LOST
from gpu_day_summary import summarize
from gpu_facts import describe_gpu, gpu_headline, missing_gpu
from machine import describe_machine, headline

WORTH = {"right": 3.0, "loads": 1.5, "speed": 3.0, "deeper": 1.0}
"""Shares of the time, of what is left when a stage begins."""
GRACE = 10.0
"""Seconds between the end that a stage is told and the one that it gets."""
DRY_SECONDS = dict.fromkeys(WORTH, 120.0)
DRY_GRACE = 60.0
MOST_WORKERS = 8
MOST_STARTS = 12
SUMMARY_SECONDS = 5.0
_started: list[subprocess.Popen[bytes]] = []
"""All that this day has started, to be ended with it."""


@dataclass(frozen=True)
class Limit:
    """When a stage should end by itself, and when it is ended (seconds of `time.time`)."""

    soft: float
    hard: float


def run_day(options: argparse.Namespace) -> int:
    """All stages, then the table; 1 when something is wrong, 2 without a GPU."""
    missing = None if options.dry else missing_gpu()
    if missing is not None:
        print(missing.replace("bench/kernels.py", "bench/gpu_day.py --minutes 8 --out DIR"))
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started ends, too
    end = time.time() + options.minutes * 60 - SUMMARY_SECONDS
    clean(options.out)
    day = Record(options.out / "day.json")
    day.values |= {"machine": describe_machine(), "dry": options.dry, "minutes": options.minutes, "stages": {}}
    print(headline(day.values["machine"]), flush=True)
    if not options.dry:
        day.values["gpu"] = describe_gpu(torch.device("cuda", torch.cuda.current_device()))
        print(gpu_headline(day.values["gpu"]), flush=True)
    day.write()
    try:
        maker = start(options, "checkpoints", end)
        left = [stage for stage in WORTH if stage in options.stages]
        while left:
            limit = limit_of(left, end, options.dry)
            stage = left.pop(0)
            day.values["stages"][stage] = run_stage(options, stage, limit, maker)
            day.write()
    finally:
        for process in _started:
            stop(process)
        if options.work.is_relative_to(options.out):
            shutil.rmtree(options.work, ignore_errors=True)
    text, wrong = summarize(options.out)
    (options.out / "summary.md").write_text(text + "\n")
    print(f"\n{text}")
    return 1 if wrong else 0


def clean(out: Path) -> None:
    """Remove what an earlier day left, which the stages would go on with."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("day.json", "right-*.json", *(f"{stage}.json" for stage in WORTH), "*.log", "*.part", "summary.md")
    for pattern in (*names, "trace-*.json.gz"):
        for path in out.glob(pattern):
            path.unlink()


def limit_of(left: list[str], end: float, dry: bool) -> Limit:
    """The next stage's share of what is left; a dry one has all the time it needs on a busy machine."""
    now = time.time()
    if dry:
        return Limit(now + DRY_SECONDS[left[0]], now + DRY_SECONDS[left[0]] + DRY_GRACE)
    share = WORTH[left[0]] / sum(WORTH[stage] for stage in left)
    hard = now + max(0.0, end - now) * share
    return Limit(hard - min(GRACE, (hard - now) / 4), hard)


def start(options: argparse.Namespace, stage: str, until: float, share: str = "0/1") -> subprocess.Popen[bytes]:
    """The process of a stage, in a group of its own; what it says goes to a log."""
    script = Path(__file__).resolve().with_name("gpu_day.py")
    line = [sys.executable, str(script), "--out", str(options.out), "--work", str(options.work), "--stage", stage]
    line += ["--share", share, "--until", str(until), *(["--dry"] if options.dry else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.dry and stage == "deeper":
        environment["TRITON_INTERPRET"] = "1"
    log = options.out / f"{stage}{'' if share == '0/1' else '-' + share.replace('/', 'of')}.log"
    with log.open("ab") as file, _signals_wait():
        process = subprocess.Popen(
            line,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        _started.append(process)
    return process


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """A signal that ends the day does so when the process that is being started is known."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda signum, frame: came.append(signum))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            raise KeyboardInterrupt


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_stage(
    options: argparse.Namespace, stage: str, limit: Limit, maker: subprocess.Popen[bytes]
) -> dict[str, float | list[str]]:
    """Run one stage to its end or its limit; how long it took, and how its processes ended."""
    begun = time.time()
    print(f"== {stage}: {limit.soft - begun:.0f} s, from {time.strftime('%H:%M:%S')}", flush=True)
    said: list[str] = []
    if stage != "right" and not finished(maker, limit.soft):
        said.append("the checkpoints were not made in time")
        stop(maker)
    number = 1 if stage != "right" or options.dry else max(1, min(MOST_WORKERS, (os.cpu_count() or 2) // 2))
    shares = [f"{share}/{number}" for share in range(number)]
    running = {share: start(options, stage, limit.soft, share) for share in shares}
    starts = dict.fromkeys(shares, 1)
    try:
        while running and time.time() < limit.hard:
            for share, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[share]
                if code == 0:
                    continue
                said.append(f"share {share} ended with {code}; see its log")
                again = (
                    (stage == "right" or code < 0 or code == LOST)
                    and starts[share] < MOST_STARTS
                    and time.time() < limit.soft
                )
                if again:  # behind the input that it was on
                    starts[share] += 1
                    running[share] = start(options, stage, limit.soft, share)
            time.sleep(0.1)
        said += [f"share {share} was ended at its limit" for share in running]
    finally:
        for process in running.values():
            stop(process)
    seconds = time.time() - begun
    print(f"   {seconds:.0f} s {'; '.join(said)}", flush=True)
    return {"seconds": seconds, "said": said}


def finished(process: subprocess.Popen[bytes], until: float) -> bool:
    """Whether a process ends in time."""
    try:
        process.wait(max(0.0, until - time.time()))
    except subprocess.TimeoutExpired:
        return False
    return True
