"""`bench/gpu_day.py`: all of it dry, in a process; what it makes of failures, on kernels that are wrong on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_day
import gpu_day_cases
import gpu_day_loads
import gpu_day_record
import gpu_day_right
import gpu_day_run
import gpu_day_summary
import pytest
import torch
from gpu_day_cases import Case, Target, Wrong, check
from gpu_day_record import DeviceLost, Record, Steps
from gpu_day_right import Checker

BENCH = Path(gpu_day.__file__).parent
CPU = torch.device("cpu")
QUANTIZE = Target("quantize", "mxfp4", "numba")


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """The script as on a machine where nothing but what it needs is installed, from any folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, str(BENCH / "gpu_day.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.mark.slow
def test_a_dry_day_goes_through_every_stage(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is on Linux only")
    done = run(["--dry", "--out", "day"], tmp_path)
    out = tmp_path / "day"
    logs = "\n".join(path.read_text() for path in out.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    right, loads, speed, deeper = (
        json.loads((out / f"{name}.json").read_text()) for name in ("right-0of1", "loads", "speed", "deeper")
    )
    assert [found["done"] for found in (right, loads, speed, deeper)] == [True] * 4
    assert {entry["operation"] for entry in right["targets"].values()} == set(gpu_day_cases.CHECKS)
    assert all(entry["cases"] and entry["examples"] for entry in right["targets"].values())
    assert [row["right"] for row in (*loads["demo"], *loads["large"])] == [True] * 4
    assert min(len(speed[part]) for part in ("quantize", "linear", "loads")) > 0
    assert speed["loads"][0]["read_bytes_per_second"] > 0
    assert len(deeper["tiles"][0]["ratios"]) > 1
    assert (out / "trace-load.json.gz").stat().st_size > 0
    assert not (out / "work").exists()
    assert "WRONG" not in done.stdout
    assert "docs/platforms.md" in (out / "summary.md").read_text()


@pytest.mark.slow
def test_a_day_that_is_ended_leaves_no_process_and_no_checkpoint(tmp_path: Path) -> None:
    line = [sys.executable, str(BENCH / "gpu_day.py"), "--dry", "--out", "day"]
    with subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as day:
        out = tmp_path / "day"
        until = time.time() + 60
        while not (out / "right.log").exists() and time.time() < until:
            time.sleep(0.05)
        assert (out / "right.log").exists()
        day.terminate()
        assert day.wait(30) != 0
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            commands.append(path.read_bytes())
    assert not any(str(out).encode() in command for command in commands)
    assert not (out / "work").exists()


def test_without_a_gpu_nothing_runs_and_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(["--out", "day"], tmp_path)
    assert done.returncode == 2
    assert "python bench/gpu_day.py" in done.stdout
    assert not (tmp_path / "day").exists()


@pytest.mark.slow
def test_the_package_is_found_in_the_repository(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
        "from gpu_day_package import package_in_place, is_ours\n"
        "with package_in_place():\n"
        "    import subprocess, quantload.kernels.formats as f\n"
        "    assert is_ours()\n"
        "    line = [sys.executable, '-c', 'import quantload.kernels.registry as r; print(r.__file__)']\n"
        "    print(f.__file__, subprocess.check_output(line, text=True))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def broken(monkeypatch: pytest.MonkeyPatch, from_cols: int) -> None:
    """Quantize gives one wrong byte where a weight has so many columns."""
    right = gpu_day_cases.kernel_of

    def kernel_of(target: Target, device: torch.device) -> Any:
        kernel = right(target, device)
        if target.operation != "quantize":
            return kernel

        def function(source: torch.Tensor, tensors: Any, *rest: Any, **more: Any) -> int:
            count: int = kernel.function(source, tensors, *rest, **more)
            if source.shape[1] >= from_cols:
                tensors[0].view(torch.uint8)[0, 0] ^= 1
            return count

        return replace(kernel, function=function)

    monkeypatch.setattr(gpu_day_cases, "kernel_of", kernel_of)


def test_right_kernels_pass(tmp_path: Path) -> None:
    for target, case in (
        (QUANTIZE, Case(33, 70, "bfloat16")),
        (replace(QUANTIZE, format="nvfp4", mode="mse"), Case(5, 33, "float32", exponent=9)),
        (Target("dequantize", "mxfp6_e2m3", "numba"), Case(6, 64, "float16")),
        (Target("linear", "int4_group128_f16", "numba"), Case(40, 100, "bfloat16", tokens=5, bias=True)),
        (Target("experts", "fp8_channel", "numba"), Case(16, 64, "float32", tokens=4)),
    ):
        assert check(target, case, CPU) <= 1


def test_a_wrong_kernel_is_told_with_its_smallest_input_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, from_cols=60)
    monkeypatch.setattr(gpu_day_right, "targets", lambda *_: [QUANTIZE, Target("dequantize", "mxfp4", "numba")])
    options = Namespace(until=time.time() + 60, dry=True, share="0/1")
    record = Record(tmp_path / "right-0of1.json")
    gpu_day_right.run(record, CPU, options)
    record.write()
    found = json.loads((tmp_path / "right-0of1.json").read_text())["targets"]
    (failure,) = found["quantize mxfp4 numba"]["failures"]
    assert "1 of" in failure["why"]
    assert (failure["smallest"]["rows"], failure["smallest"]["cols"]) == (1, 60)
    assert found["dequantize mxfp4 numba"]["failures"] == []
    assert found["dequantize mxfp4 numba"]["examples"] > 0
    (tmp_path / "day.json").write_text(json.dumps({"stages": {"right": {"seconds": 1, "said": []}}}))
    text, wrong = gpu_day_summary.summarize(tmp_path)
    assert wrong
    assert "mend these kernels first" in text
    assert "quantize mxfp4 numba" in text


def test_a_wrong_product_is_seen() -> None:
    kernel = gpu_day_cases.kernel_of(Target("linear", "mxfp4", "numba"), CPU)
    want = torch.randn(8, 16).double()
    assert gpu_day_cases.share_of_allowed(kernel, want.bfloat16(), want, want.abs(), torch.ones(8, 1)) < 1
    one_off = want.clone()
    one_off[3, 3] += 0.5
    for got in (one_off, want * 1.02, want + torch.nan):
        with pytest.raises(Wrong):
            gpu_day_cases.share_of_allowed(kernel, got.bfloat16(), want, want.abs(), torch.ones(8, 1))


def test_what_a_process_died_on_is_a_failure_and_the_next_goes_on_behind_it(tmp_path: Path) -> None:
    record, case = Record(tmp_path / "right.json"), Case(1, 2, "bfloat16")
    entry = Checker(record, CPU, time.time() + 60).entry(QUANTIZE)
    entry["now"] = case.to_dict()
    record.write()
    again = Checker(Record(record.path), CPU, time.time() + 60)
    (failure,) = again.found[QUANTIZE.label]["failures"]
    assert failure["case"] == case.to_dict()
    again.chosen(QUANTIZE, True)
    assert again.found[QUANTIZE.label]["cases"] == 0


def test_a_lost_device_ends_the_process_through_hypothesis_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost(*_: object) -> None:
        raise DeviceLost

    monkeypatch.setattr(gpu_day_right, "check", lose)
    monkeypatch.setattr(gpu_day_right, "check_device", lost)
    checker = Checker(Record(tmp_path / "right.json"), CPU, time.time() + 60)
    entry = checker.entry(QUANTIZE)
    with pytest.raises(DeviceLost):
        checker.drawn(QUANTIZE, entry, 5, time.time() + 60)
    (failure,) = json.loads((tmp_path / "right.json").read_text())["targets"][QUANTIZE.label]["failures"]
    assert "illegal memory access" in failure["why"]


def test_a_step_that_fails_ends_nothing_and_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    steps = Steps(Record(tmp_path / "s.json"), CPU, time.time() + 60, "rows")
    steps.step("rows", "first", fail)
    steps.step("rows", "second", lambda: {"a": 1})
    assert steps.record.values["rows"] == [{"a": 1}]

    def lost(*_: object) -> None:
        raise DeviceLost

    monkeypatch.setattr(gpu_day_record, "check_device", lost)
    with pytest.raises(DeviceLost):
        steps.step("rows", "third", fail)
    monkeypatch.undo()
    again = Steps(Record(tmp_path / "s.json"), CPU, time.time() + 60, "rows")
    for what in ("first", "second", "third", "fourth"):
        again.step("rows", what, lambda: [{"b": 2}])
    assert again.record.values["rows"] == [{"a": 1}, {"b": 2}]
    assert {failure["what"] for failure in again.record.values["failures"]} == {"first", "third"}
    again.until = 0.0
    again.step("rows", "fifth", fail)
    assert again.record.values["not reached"] == ["fifth"]


def test_other_tokens_are_explained_by_a_small_margin_only() -> None:
    theirs = torch.randn(4, 50) * 3
    theirs[2, :2] = torch.tensor([20.0, 19.98])
    ours = theirs + 0.01 * torch.randn(4, 50)
    left, right = [5, 6, 1, 9], [5, 6, 0, 8]
    near = gpu_day_loads.compare_tokens((left, ours), (right, theirs), False)
    assert (near["same"], near["explained"]) == (2, True)
    theirs[2, 0] = 30.0
    far = gpu_day_loads.compare_tokens((left, ours), (right, theirs), False)
    assert not far["explained"]
    same = gpu_day_loads.compare_tokens((right, theirs), (right, theirs), False)
    assert (same["same"], same["explained"]) == (4, True)
    assert not gpu_day_loads.compare_tokens((right, theirs + 5 * torch.randn(4, 50)), (right, theirs), False)[
        "explained"
    ]


def test_a_process_that_loses_its_device_is_followed_by_another_and_one_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = iter(["import sys; sys.exit(3)", "import os; os.abort()", "pass", "import time; time.sleep(600)"])
    started: list[subprocess.Popen[bytes]] = []

    def start(*_: object) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", next(codes)], start_new_session=True))
        return started[-1]

    monkeypatch.setattr(gpu_day_run, "start", start)
    maker = subprocess.Popen([sys.executable, "-c", "pass"])
    options = Namespace(dry=True, out=tmp_path)
    long = gpu_day_run.Limit(time.time() + 60, time.time() + 60)
    ended = gpu_day_run.run_stage(options, "speed", long, maker)
    assert [process.poll() for process in started] == [3, -6, 0]
    assert ended["said"] == ["share 0/1 ended with 3; see its log", "share 0/1 ended with -6; see its log"]
    short = gpu_day_run.Limit(time.time() + 1, time.time() + 1)
    ended = gpu_day_run.run_stage(options, "deeper", short, maker)
    assert ended["said"] == ["share 0/1 was ended at its limit"]
    assert started[-1].poll() == -9


def test_the_formats_that_matter_most_come_first_and_those_of_torch_last() -> None:
    found = gpu_day_cases.targets(CPU, ("nvfp4", "fp8_block"))
    assert [(target.format, target.operation) for target in found][:3] == [
        ("nvfp4", "quantize"), ("nvfp4", "quantize"), ("nvfp4", "dequantize"),
    ]  # fmt: skip
    every = gpu_day_cases.targets(torch.device("cuda"), gpu_day_right.chosen_formats(False))
    kernels = [target.kernel for target in every]
    assert kernels.index("torch") >= len(kernels) - kernels.count("torch")


def test_each_stage_gets_its_share_of_what_is_left() -> None:
    end = time.time() + 425
    limit = gpu_day_run.limit_of(["right", "loads", "speed", "deeper"], end, False)
    assert limit.hard - time.time() == pytest.approx(150, abs=1)
    assert limit.hard - limit.soft == gpu_day_run.GRACE
    assert gpu_day_run.limit_of(["deeper"], end, False).hard == pytest.approx(end)


def test_a_record_is_whole_and_says_what_json_cannot(tmp_path: Path) -> None:
    record = Record(tmp_path / "a" / "b.json")
    record.values["x"] = [float("nan"), (1, float("inf"))]
    record.write()
    assert Record(record.path).values == {"x": ["nan", [1, "inf"]]}


def test_the_table_says_what_was_cut_off_and_what_is_slow(tmp_path: Path) -> None:
    stages = {"speed": {"seconds": 3, "said": ["share 0/1 was ended at its limit"]}}
    (tmp_path / "day.json").write_text(json.dumps({"stages": stages}))
    row = {"format": "mxfp4", "rows": 64, "cols": 128, "tokens": 1, "default": "triton", "ratios": {"triton": 2.0}}
    speed = {"linear": [row], "now": "linear mxfp8", "not reached": ["load"]}
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    text, wrong = gpu_day_summary.summarize(tmp_path)
    assert wrong  # the process ended in the middle of something
    assert "2.00x BF16 (goal 2.5)" in text
    assert "run again with --stages speed" in text
