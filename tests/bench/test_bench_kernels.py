"""`bench/kernels.py`: what needs no GPU, on a made-up device and made-up results; and one run where there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_command
import gpu_facts
import gpu_load
import gpu_pieces
import gpu_products
import gpu_tables
import pytest
import torch
from gpu_clock import Side, speed_up, take_turns
from quantload.kernels.arrangement import Arrangement
from quantload.kernels.formats import Tensors
from quantload.kernels.registry import kernel_set, select
from result_files import results_of
from torch import Tensor

BENCH = Path(gpu_command.__file__).parent
CPU = torch.device("cpu")
GPU = {
    "name": "GPU", "architecture": "sm_90", "memory_bytes": 1 << 30, "cuda": "13.0", "hip": None,
    "driver": {"driver_version": "580", "clocks.sm": "1980", "clocks.max.sm": "1980", "clocks.mem": "3201"},
}  # fmt: skip
MACHINE = {
    "date": "2026-01-02T03:04:05+00:00", "cpu": "C", "vector_instructions": [], "cores": 2, "memory_bytes": 1 << 30,
    "kernel": "Linux 6", "load_average": [0.1], "libraries": {"python": "3.12"},
}  # fmt: skip


class Simulated:
    """A device with a queue: a launch takes 1 of the host's units, and each call as many of the device's as it says."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, units: float) -> None:
        self.host += 1.0
        self.device = max(self.device, self.host) + units

    def wait(self) -> None:
        self.host = self.device = max(self.device, self.host)

    def mark(self) -> float:
        return max(self.device, self.host)

    def hold(self, seconds: float) -> None:
        self.device = max(self.device, self.host) + 50.0

    def passed(self, mark: float) -> bool:
        return mark <= self.host

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        self.wait()


def test_the_device_is_timed_without_the_launches() -> None:
    queue = Simulated()
    short = Side(lambda i: queue.launch(0.25), 40)
    taken = take_turns(
        queue, {"short": short, "long": Side(lambda i: queue.launch(3.0), 40)}, turns=3, turn_seconds=9.0
    )
    assert taken["short"].device == [0.25] * 3
    assert taken["short"].issued == pytest.approx([1.025] * 3, abs=0.2)
    assert taken["long"].device == [3.0] * 3
    assert speed_up(taken["long"].to_dict(), taken["short"].to_dict()) == 12.0


def test_a_call_that_waits_for_the_device_is_timed_as_issued() -> None:
    queue = Simulated()

    def run(i: int) -> None:
        queue.launch(0.5)
        queue.wait()

    times = take_turns(queue, {"waits": Side(run)}, turns=2, turn_seconds=1.0)["waits"]
    assert times.device == []
    assert times.to_dict()["device"] is None
    assert times.issued == [1.5, 1.5]
    assert speed_up({"device": 9.0, "issued": 3.0}, times.to_dict()) == 2.0


class Instant(Simulated):
    """The CPU as a device whose every call is over at once."""

    def passed(self, mark: float) -> bool:
        return False

    def mark(self) -> float:
        self.host += 1.0
        return self.host


def how(failures: gpu_command.Failures) -> gpu_products.How:
    return gpu_products.How(CPU, Instant(), 60_000, turns=1, turn_seconds=0.0, attempt=failures.attempt)


def test_products_are_compared_with_what_the_codes_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = gpu_command.Failures()
    (row,) = gpu_products.measure_linear(["mxfp4"], [(64, 128)], [3], how(failures))
    assert set(row["ratios"]) == set(row["errors"]) == {"numba", "torch"}
    assert (row["default"], row["copies"], failures.found) == ("numba", 14, [])
    wrong = select("linear", "mxfp4", "cpu", "torch")
    monkeypatch.setattr(gpu_products, "kernels_of", lambda *_: [wrong])
    monkeypatch.setattr(gpu_products.Weights, "dequantized", lambda self, device: torch.ones(self.shape))
    (row,) = gpu_products.measure_linear(["mxfp4"], [(64, 128)], [3], how(failures))
    assert row["ratios"] == {}
    assert [failure["what"] for failure in failures.found] == ["linear mxfp4 64x128 3 tokens torch"]
    assert "off by" in failures.found[0]["why"]


def test_a_kernel_with_an_arrangement_gets_padded_weights_so_arranged(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = select("linear", "mxfp4", "cpu", "torch")
    seen: set[tuple[torch.Size, torch.Size]] = set()

    def upside_down(tensors: Tensors) -> None:
        for tensor in tensors:
            tensor.copy_(tensor.flip(0))

    def linear(x: Tensor, tensors: Tensors, bias: None, rows: int, cols: int) -> Tensor:
        codes, scales = tensors
        seen.add((codes.shape, scales.shape))
        own = tuple(each.flip(0)[:rows, : each.shape[1] * cols // 256].contiguous() for each in tensors)
        out: Tensor = plain(x, own, bias, rows, cols)
        return out

    arrangement = Arrangement((96, 256), upside_down, lambda tensors: tuple(each.flip(0) for each in tensors))
    kernel = replace(plain, function=linear, arrangement=arrangement)
    monkeypatch.setattr(gpu_products, "kernels_of", lambda *_: [kernel])
    failures = gpu_command.Failures()
    (row,) = gpu_products.measure_linear(["mxfp4"], [(64, 128)], [3], how(failures))
    assert failures.found == []
    assert row["errors"]["torch"] < 0.02
    assert seen == {((96, 128), (96, 8))}


def test_grouped_experts_meet_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = gpu_command.Failures()
    assert gpu_products.measure_experts(["fp8_channel"], [(4, 64, 128)], [2], how(failures)) == []  # no GPU, no kernels
    monkeypatch.setattr(gpu_products, "grouped_kernels", lambda name, device: [
        select("experts", name, device, "torch")
    ])  # fmt: skip
    (row,) = gpu_products.measure_experts(["fp8_channel"], [(4, 64, 128)], [2], how(failures))
    assert failures.found == []
    assert row["errors"]["torch"] < 0.02
    assert (row["experts"], row["top_k"]) == (4, 4)


def test_tokens_go_to_different_experts() -> None:
    routing = gpu_products.route(5, 16, 32, CPU)
    assert routing.x.shape == (5 * gpu_products.TOP_K, 32)
    assert routing.borders == routing.offsets.tolist()
    assert len(routing.borders) == 17
    assert max(b - a for a, b in zip(routing.borders, routing.borders[1:], strict=False)) <= 5


def test_pieces_are_counted_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = gpu_command.Failures()
    monkeypatch.setattr(gpu_pieces, "queued_quantize", lambda kernels: lambda *a: kernels.quantize(*a[:2], a[3]))
    settings = {"rotated_bytes": 100_000, "device": CPU, "queue": Instant(), "turns": 1, "turn_seconds": 0.0}
    (row,) = gpu_pieces.measure_pieces(["fp8_tensor"], [1 << 15], failures.attempt, **settings)
    assert failures.found == []
    assert (row["pieces"], row["differing"]) == (4, 0)
    assert row["moved_bytes"]["copy"] == 2 << 15
    assert row["moved_bytes"]["quantize"] == (2 << 15) + (1 << 14) + 4
    kernels = kernel_set("mxfp4", "cpu")
    assert gpu_pieces.differing_codes(kernels, CPU) == 0
    monkeypatch.setattr(gpu_pieces, "select", lambda *_: select("quantize", "mxfp4", "cpu", "torch"))
    fake = type(kernels)(**{**vars(kernels), "quantize": lambda s, tensors, *rest: tensors[0].fill_(7)})
    assert gpu_pieces.differing_codes(fake, CPU) > 0


@pytest.mark.slow
def test_a_load_takes_turns_with_a_copy(tmp_path: Path) -> None:
    failures = gpu_command.Failures()
    load = gpu_load.measure_loads(["int8_per_channel"], 0.002, tmp_path, CPU, 2, failures.attempt)
    (row,) = load["rows"]
    assert failures.found == []
    assert row["share_of_copy"] == pytest.approx(row["copy_seconds"] / row["seconds"])
    assert row["final_bytes"] == row["reported_final_bytes"] < row["bytes"]
    assert row["kernels"] == ["numba"]


def times(seconds: float, waits: bool = False) -> dict[str, Any]:
    return {"device": None if waits else seconds, "issued": seconds, "turns": {}}


def made_up() -> dict[str, Any]:
    """What a run writes, in round numbers."""
    seconds = {"copy": times(1e-5), "quantize": times(1e-5), "+ stats": times(2e-5)}
    seconds |= {"call": times(4e-5, True), "call + stats": times(5e-5, True)}
    piece = {
        "format": "mxfp4", "kernel": "triton", "piece_bytes": 8 << 20, "pieces": 64, "differing": 0,
        "moved_bytes": {"copy": 2e7} | dict.fromkeys(list(seconds)[1:], 1.8e7), "seconds": seconds,
        "share_of_copy": {"quantize": 0.9, "+ stats": 0.45, "call": 0.2, "call + stats": 0.1},
    }  # fmt: skip
    common = {"format": "mxfp4", "rows": 4096, "cols": 4096, "default": "triton", "errors": {}}
    sides = {"bf16": times(9e-6), "triton": times(3e-6), "torch": times(9e-5, True)}
    linear = [{**common, "tokens": n, "seconds": sides, "ratios": {"triton": 3.0 / n, "torch": 0.1}} for n in (1, 64)]
    load = {
        "scheme": "quark_mxfp4", "bytes": 3e9, "seconds": 0.1, "stream": 0.08, "copy_seconds": 0.06,
        "share_of_copy": 0.6, "final_bytes": 1 << 30, "peak_bytes": (1 << 30) + (100 << 20), "staging_bytes": 32 << 20,
        "slack_bytes": 64 << 20,
    }  # fmt: skip
    return {
        "machine": MACHINE, "gpu": GPU, "file": "kernels-2026-01-02.json", "quantize": [piece], "linear": linear,
        "experts": [{**linear[0], "experts": 128}], "load": {"checkpoint": "dense", "rows": [load]},
        "failures": [{"what": "linear of this", "why": "ValueError: that"}],
    }  # fmt: skip


def test_tables_and_goals() -> None:
    text = gpu_tables.render(made_up())
    assert "| mxfp4 8 MiB | 2000 | 1800 | 0.90 | 900 | 0.45 | 40 | 50 | 0 |" in text
    assert "| mxfp4 4096x4096, triton | 3.0 / 9.0 | 3.00x | 0.05x |" in text
    assert "| mxfp4 4096x4096, torch | 90.0* / 9.0 | 0.10x | 0.10x |" in text
    assert "| mxfp4 128x4096x4096, triton | 3.0 / 9.0 | 3.00x |" in text
    assert "| quark_mxfp4 | 0.100 | 30.0 | 37.5 | 50.0 | 0.60 | 1.07 | 100.0 | 32.0 |" in text
    assert "- linear of this: ValueError: that" in text
    assert "GPU, sm_90, 1 GiB, CUDA 13.0, driver 580, SM clock 1980 of 1980 MHz" in text
    assert ", torch |" not in gpu_tables.render(made_up(), every_kernel=False)
    quantize, decode, rate, memory = gpu_tables.goals_of(made_up())
    assert (quantize.met, quantize.reached) == (False, "0.45, 47.1% short")
    assert (decode.met, decode.reached, decode.checkpoint) == (True, "3.00x", "4096x4096")
    assert (rate.met, rate.reached) == (False, "0.60, 29.4% short")
    assert (memory.met, memory.reached) == (False, "100.00 MiB over final, 4.2% over")
    wrong = made_up()
    wrong["quantize"][0]["differing"] = 1
    assert gpu_tables.goals_of(wrong)[0].met is None


def test_each_part_is_of_the_newest_run_that_has_it(tmp_path: Path) -> None:
    newer, older = made_up(), made_up()
    newer["file"] = "newer.json"
    del newer["linear"], newer["experts"]
    found = gpu_tables.newest_parts([newer, older])
    assert [set(gpu_tables.PARTS) & set(result) for result in found] == [{"quantize", "load"}, {"linear", "experts"}]
    text = gpu_tables.section([newer, older])
    assert text.count("**Quantizing**") == text.count("**Experts**") == 1
    assert text.index("newer.json") < text.index("kernels-2026-01-02.json")
    assert "1 token: >= 2.5x" in gpu_tables.summary([newer, older])


def test_quick_gives_only_what_is_not_given_other_values() -> None:
    full = gpu_command.options_of([])
    assert full.turns == 7
    assert gpu_command.reduced(full) == ""
    assert gpu_command.reduced(gpu_command.options_of(["--parts", "load"])) == ""
    assert gpu_command.reduced(gpu_command.options_of(["--tokens", "1"])) == "part"
    assert gpu_command.reduced(gpu_command.options_of(["--scale", "0.5"])) == "part"
    quick = gpu_command.options_of(["--quick", "--turns", "2"])
    assert (quick.turns, quick.formats, gpu_command.reduced(quick)) == (2, ["mxfp4"], "quick")


@pytest.mark.parametrize("arguments", [["--shapes", "4096"], ["--experts", "4096x4096"], ["--formats", "mxfp5"]])
def test_what_cannot_be_measured_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_command.options_of(arguments)
    assert arguments[1] in capsys.readouterr().err


def test_without_a_gpu_one_line_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_command.run(["--results", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "torch.cuda.is_available() is False" in line
    assert "python bench/kernels.py" in line
    assert list(tmp_path.iterdir()) == []


def test_what_the_driver_says_is_kept_and_what_it_does_not_say_is_an_error() -> None:
    answer = ", ".join("1" for _ in gpu_facts.SMI_FIELDS)
    assert gpu_facts.ask_nvidia(["echo", answer]) == dict.fromkeys(gpu_facts.SMI_FIELDS, "1")
    assert "answered" in gpu_facts.ask_nvidia(["echo", "N/A"])["error"]
    assert "no-such-command" in gpu_facts.ask_nvidia(["no-such-command"])["error"]


def test_the_package_called_kernels_comes_first(tmp_path: Path) -> None:
    see = "import kernels, json; print(json.dumps([kernels.__file__, hasattr(kernels, 'get_kernel')]))"
    code = f"import sys; sys.path[:0] = [{str(BENCH)!r}, {str(tmp_path)!r}]; {see}"

    def found() -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        answer: list[Any] = json.loads(done.stdout)
        return answer

    assert found() == [str(BENCH / "kernels.py"), False]
    package = tmp_path / "kernels"
    package.mkdir()
    assert found() == [str(BENCH / "kernels.py"), False]  # a folder that is no package
    (package / "__init__.py").write_text("def get_kernel(): ...\n")
    assert found() == [str(package / "__init__.py"), True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False")
def test_a_quick_run_on_this_gpu(tmp_path: Path) -> None:
    arguments = [
        "--quick",
        "--turns",
        "1",
        "--scale",
        "0.01",
        "--work",
        str(tmp_path),
        "--results",
        str(tmp_path / "r"),
    ]
    done = subprocess.run([sys.executable, str(BENCH / "kernels.py"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results_of("kernels", tmp_path / "r") == []  # reduced
    (path,) = (tmp_path / "r").iterdir()
    result = json.loads(path.read_text())
    assert result["failures"] == []
    assert result["gpu"]["name"] == torch.cuda.get_device_name()
    assert all(result[part] for part in gpu_tables.PARTS)
