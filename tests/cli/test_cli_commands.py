"""The command line: what is on stdout, what the exit code says, and that no error is a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantload import cli
from quantload.cli import commands
from quantload.cli.pages import typed
from quantload.cli.preparing import display_name
from quantload.errors import (
    CheckpointError,
    LoadCancelledError,
    MemoryBudgetError,
    NoKernelError,
    PolicyError,
    QuantloadError,
    RouteError,
    UnknownSchemeError,
    UnsafePathError,
    UnsupportedCheckpointError,
)
from quantload.memory import logs
from quantload.memory.report import LoadReport
from quantload.schemes.support_tables import support_tables
from range_server import RangeServer


class CheckpointErrorForMemory(CheckpointError):
    """One that stands for a file that could not be read for want of memory."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.__cause__ = MemoryError()


Checkpoint = Callable[[str], Path]
FULL_DISK = Path("/dev/full")


class Command:
    """Runs `quantload` in this process, as its entry point does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit code, stdout, stderr: what reaches the file descriptors, not only what Python printed."""
        self._monkeypatch.setattr(sys, "argv", ["quantload", *map(str, arguments)])
        self._capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        out, err = self._capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        """What a run with --json printed, and nothing else may have been."""
        code, out, err = self(*arguments, "--json")
        assert code == 0, err
        assert out.endswith("}\n")
        assert out.count("\n") == 1
        value: dict[str, Any] = json.loads(out)
        return value


@pytest.fixture
def quantload(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capfd)


# pages


def test_a_load_leaves_a_page_whether_it_comes_to_its_end_or_not(
    quantload: Command, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    page, saved = tmp_path / "page.html", tmp_path / "r.json"
    report = quantload.json("load", checkpoint("llama"), "--max-memory", "1GiB", "--html", page, "--report", saved)
    assert (
        report["command"]
        == f"quantload load {checkpoint('llama')} --max-memory 1GiB --html {page} --report {saved} --json"
    )
    assert report["limit_bytes"] == 1 << 30
    assert report["available_bytes"] > 0
    assert [each["name"] for each in report["phases"]] == ["resolve", "plan", "compile", "check", "stream", "finish"]
    assert sum(each["seconds"] for each in report["phases"]) == pytest.approx(report["seconds"], abs=0.1)
    assert "of 1.000 GiB allowed" in page.read_text()

    again = tmp_path / "again.html"
    assert quantload("report", saved, "--html", again) == (0, "", "")
    assert again.read_text() == page.read_text()

    code, _, err = quantload("load", checkpoint("llama"), "--max-memory", "1MiB", "--html", page)
    assert code == 4
    assert "error: the load needs" in err
    assert "MemoryBudgetError: the load needs" in page.read_text()
    assert "phase &#x27;check&#x27;" in page.read_text()
    assert quantload("load", checkpoint("llama"), "--html", tmp_path)[0] == 2


@pytest.mark.parametrize("command", ["load", "plan", "compare", "generate"])
def test_a_password_in_an_address_is_shown_nowhere(
    command: str, quantload: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    with RangeServer(cli.DEMO_MODEL.parent) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        model = f"{server.url}/{cli.DEMO_MODEL.name}?sig=hunter2".replace("://", "://me:hunter2@")
        files = [tmp_path / name for name in ("page.html", "report.json")] if command == "load" else []
        written = [part for path in files for part in (f"--{path.stem.replace('page', 'html')}", path)]
        given = ["--prompt", "x", "--max-new-tokens", "1"] if command == "generate" else []
        code, out, err = quantload(command, model, *written, *given, "--json", "-v")
        assert code == 0, err
        told = [out, err, *(path.read_text() for path in files)]
        if command == "load":
            assert quantload(command, model, *written, "--max-memory", "1MiB")[0] == 4
            told.append(files[0].read_text())
            assert all(f"{server.url}/{cli.DEMO_MODEL.name}" in text for text in told if text is not err)
    assert all("hunter2" not in text for text in told)


@pytest.mark.parametrize("given", [["--api-key", "hunter2"], ["--api-key=hunter2"]])
def test_what_was_typed_is_shown_without_keys(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quantload", "serve", "s3://bucket/m", *given, "--port", "80"])
    shown = typed()
    assert shown.startswith("quantload serve s3://bucket/m --api-key")
    assert shown.endswith(" --port 80")
    assert "hunter2" not in shown


def test_a_model_is_served_under_an_address_without_credentials() -> None:
    assert display_name("https://me:hunter2@host/m?sig=hunter2") == "https://host/m"
    assert display_name("org/model") == "org/model"


# convert


def test_convert_writes_a_checkpoint_and_prints_its_report(
    quantload: Command, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("convert", checkpoint("llama"), out, "--format", "compressed-tensors", "--max-shard-size", "20kB")
    report = quantload.json(*arguments, "-q", "quark_mxfp4", "--ignore", "*.k_proj", "--report", tmp_path / "r.json")
    assert report["quantization"] == "quark_mxfp4"
    assert report["final_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert len(list(out.glob("*.safetensors"))) > 1
    assert (
        "model.layers.0.self_attn.k_proj"
        in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    )
    assert LoadReport.load(tmp_path / "r.json").final_bytes == report["final_bytes"]
    loaded = quantload.json("load", out)
    assert {layer["scheme"] for layer in loaded["layers"]} == {"prequantized"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--format", "gguf"), 2, "'gguf'"),
        (
            ("-q", "mxfp6_e3m2", "--format", "compressed-tensors"),
            2,
            "mxfp6_e3m2 cannot be written as compressed-tensors",
        ),
        (("--max-shard-size", "big"), 2, "'big' is not an amount of memory"),
        (("--max-memory", "1MiB"), 4, "the limit is"),
    ],
)
def test_convert_says_what_it_cannot_do(
    arguments: tuple[str, ...], code: int, message: str, quantload: Command, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found, out, err = quantload("convert", checkpoint("llama"), tmp_path / "out", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_convert_does_not_touch_what_is_there(quantload: Command, checkpoint: Checkpoint, tmp_path: Path) -> None:
    code, _, err = quantload("convert", checkpoint("llama"), tmp_path)
    assert code == 1
    assert "exists; give a folder that does not, or remove it first" in err


# load


def test_load_prints_the_report_as_one_json_object(quantload: Command, checkpoint: Checkpoint) -> None:
    report = quantload.json("load", checkpoint("qwen3_moe"), "--quantization", "quark_mxfp4", "--workers", "1")
    assert LoadReport.from_dict(report).to_dict() == report
    assert report["quantization"] == "quark_mxfp4"
    assert report["device"] == "cpu"
    assert {layer["kind"] for layer in report["layers"]} == {"linear", "experts"}
    assert {"name": "lm_head", "reason": "output head"}.items() <= report["kept"][-1].items()


def test_the_second_load_reads_what_the_first_one_left(
    quantload: Command, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    arguments = ("load", checkpoint("qwen3_moe"), "--cache", tmp_path / "cache", "--cache-size", "1GiB")
    first, second = (quantload.json(*arguments) for _ in range(2))
    assert [first["cache"], second["cache"]] == ["written", "hit"]
    assert second["layers"] == first["layers"]
    code, out, err = quantload(*arguments)
    assert code == 0
    assert "cache: hit" in out
    assert "Cache: reading" in err
    full = [quantload.json(*arguments, "--cache-verify", "full")["cache"] for _ in range(2)]
    assert full == ["written", "hit"]


def test_a_cache_that_cannot_be_is_a_usage_error(quantload: Command, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, complaint in (
        (("--cache", tmp_path / "file"), "is a file; give a folder"),
        (("--cache", ""), "cache is ''; give the path of a folder"),
        (("--cache", tmp_path, "--cache-size", "many"), "'many' is not an amount"),
        (("--cache", tmp_path, "--cache-size", "0B"), "cache_bytes is 0"),
        (("--cache", tmp_path, "--cache-verify", "none"), "'samples',"),
        (("--cache-verify", "full"), "--cache-verify full is given without --cache"),
    ):
        code, _, err = quantload("load", checkpoint("llama"), *arguments)
        assert code == 2
        assert complaint in err


def test_log_lines_go_to_stderr_and_tables_to_stdout(quantload: Command, checkpoint: Checkpoint) -> None:
    code, out, err = quantload("load", checkpoint("llama"))
    assert code == 0
    assert "quark_mxfp4" in out
    assert "load_weights" not in out
    assert "Online quark_mxfp4 quantization: quantized 14 layers of types:" in err
    assert "Peak CPU memory during load_weights" in err


def test_log_lines_are_not_wrapped(quantload: Command, checkpoint: Checkpoint) -> None:
    """A log that was written to a file can be parsed, whatever the width of the terminal it was not written to."""
    _, out, _ = quantload("load", checkpoint("qwen3_moe"), "--json")
    _, _, err = quantload("load", checkpoint("qwen3_moe"))
    report = json.loads(out)
    parsed = logs.parse(err)
    assert parsed.quantized_layers == len(report["layers"])
    assert sorted(parsed.layer_types or ()) == sorted({layer["name"].rpartition(".")[2] for layer in report["layers"]})
    assert max(map(len, err.splitlines())) > 80


def test_load_without_a_model_takes_the_bundled_one(quantload: Command) -> None:
    report = quantload.json("load", "--stats", "off")
    assert report["quantization"] == "quark_mxfp4"
    assert len(report["layers"]) > 10
    assert all(layer["sqnr_db"] is None for layer in report["layers"])


def test_the_scale_mode_reaches_the_load(quantload: Command) -> None:
    report = quantload.json("load", "--scale-mode", "mse")
    assert {layer["kernel"] for layer in report["layers"]} == {"numba, mse scales"}


def test_the_options_reach_the_load(quantload: Command, checkpoint: Checkpoint) -> None:
    report = quantload.json(
        "load", checkpoint("qwen3_moe"), "-q", "fp8_per_channel", "--experts", "int8_per_channel",
        "--ignore", "*.q_proj", "--ignore", "*.k_proj", "--override", "re:.*v_proj=none",
        "--override", "*.o_proj=fp8_per_block", "--no-default-ignore", "--chunk", "16KiB", "--staging", "1MiB",
        "--kernel", "quantize=torch", "--page-cache", "keep", "--max-memory", "1GiB", "--strict",
    )  # fmt: skip
    schemes = {(layer["kind"], layer["scheme"]) for layer in report["layers"]}
    assert schemes == {("linear", "fp8_per_channel"), ("linear", "fp8_per_block"), ("experts", "int8_per_channel")}
    assert "lm_head" in {layer["name"] for layer in report["layers"]}
    reasons = {kept["name"].rpartition(".")[2]: kept["reason"] for kept in report["kept"]}
    assert reasons["q_proj"] == "ignored by pattern '*.q_proj'"
    assert reasons["k_proj"] == "ignored by pattern '*.k_proj'"
    assert reasons["v_proj"].startswith("none leaves")
    assert all("quantize=torch" in layer["kernel"] for layer in report["layers"])
    assert report["staging_peak_bytes"] <= 1 << 20


def test_a_kernel_is_chosen_by_operation(quantload: Command, checkpoint: Checkpoint) -> None:
    path = checkpoint("qwen3_moe")
    report = quantload.json("load", path, "--device", "cpu", "--kernel", "linear=torch", "--kernel", "observe=torch")
    for layer in report["layers"]:
        chosen = dict(part.split("=") for part in layer["kernel"].split(", "))
        assert {operation for operation, name in chosen.items() if name == "torch"} == {"linear", "experts", "observe"}
    code, out, err = quantload("load", path, "--device", "cpu", "--kernel", "linear=triton_w4a4")
    assert (code, out) == (1, "")
    assert "no kernel 'triton_w4a4' for linear of mxfp4 on cpu" in err
    assert "triton_w4a4: runs on cuda only, not on cpu" in err
    assert "numba: can run" in err


@pytest.mark.parametrize("command", ["load", "plan", "serve"])
def test_a_kernel_that_does_not_exist_is_a_usage_error(quantload: Command, command: str, tmp_path: Path) -> None:
    """Before anything else is looked at: there is no such model."""
    code, out, err = quantload(command, tmp_path / "none", "--kernel", "quantize=foo")
    assert (code, out) == (2, "")
    assert "kernels has 'foo' for quantize; kernels for it are triton, numba, torch" in err
    code, _, err = quantload(command, tmp_path / "none", "--kernel", "multiply=torch")
    assert code == 2
    assert "kernels names the operation 'multiply'; operations are quantize, observe" in err


# plan, schemes, report


def test_plan_says_what_load_does(quantload: Command, checkpoint: Checkpoint) -> None:
    path = checkpoint("qwen3_moe")
    plan, report = quantload.json("plan", path), quantload.json("load", path)
    assert plan["final_bytes"] == report["predicted_final_bytes"]
    assert plan["fallback_conversions"] == report["fallback_conversions"] == 0
    planned = {module["name"]: module["scheme"] for module in plan["modules"]}
    assert {name for name, scheme in planned.items() if scheme} == {layer["name"] for layer in report["layers"]}
    assert {name for name, scheme in planned.items() if not scheme} == {kept["name"] for kept in report["kept"]}


def test_plan_for_people(quantload: Command) -> None:
    code, out, _ = quantload("plan")
    assert code == 0
    assert "Predicted memory" in out
    assert "tied to another parameter" in out


def test_schemes(quantload: Command) -> None:
    value = quantload.json("schemes")
    assert value["device"] == "cpu"
    assert [row["name"] for row in value["schemes"]][:2] == ["quark_mxfp4", "mxfp4_rows"]
    code, out, _ = quantload("schemes")
    assert code == 0
    assert "ptpc_fp8" in out
    rows = [row for table in support_tables() for row in table.rows]
    for cells in rows:  # not a terminal: every row is a line, with nothing cut
        assert any(line.split() == " ".join(cells).split() for line in out.splitlines()), cells


def test_a_saved_report_can_be_shown(quantload: Command, checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    printed = quantload.json("load", checkpoint("llama"), "--report", path)
    assert json.loads(path.read_text()) == printed
    assert quantload.json("report", path) == printed
    code, out, _ = quantload("report", path)
    assert code == 0
    assert "quark_mxfp4" in out


def test_version(quantload: Command) -> None:
    from importlib.metadata import version

    for option in ("--version", "-V"):
        code, out, _ = quantload(option)
        assert (code, out.strip()) == (0, version("quantload"))
    import quantload as package

    assert package.__version__ == version("quantload")


def test_python_m_quantload_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "quantload", "-V"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [((), {"info"}), (("--quiet",), set()), (("-v",), {"info", "debug"}), (("--log-level", "warning"), set())],
)
def test_how_much_is_logged(quantload: Command, arguments: tuple[str, ...], levels: set[str]) -> None:
    code, _, err = quantload("load", "--log-format", "json", *arguments)
    assert code == 0
    lines = [json.loads(line) for line in err.splitlines()]
    assert {line["level"] for line in lines} == levels
    assert all(set(line) == {"time", "level", "logger", "message"} for line in lines)


def test_more_and_less_at_once(quantload: Command) -> None:
    code, _, err = quantload("load", "-v", "--quiet")
    assert code == 2
    assert "choose one" in err


def test_every_option_can_come_from_the_environment(quantload: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLOAD_QUANTIZATION", "int8")
    monkeypatch.setenv("QUANTLOAD_IGNORE", "*.v_proj *.k_proj")
    monkeypatch.setenv("QUANTLOAD_JSON", "1")
    code, out, _ = quantload("plan")
    assert code == 0
    modules = {each["name"]: each for each in json.loads(out)["modules"]}
    assert modules["model.layers.0.self_attn.q_proj"]["scheme"] == "int8_per_channel"
    assert modules["model.layers.0.self_attn.v_proj"]["reason"] == "ignored by pattern '*.v_proj'"
    assert modules["model.layers.0.self_attn.k_proj"]["reason"] == "ignored by pattern '*.k_proj'"
    assert quantload("plan", "-q", "none")[0] == 0  # what is given counts more


@pytest.mark.parametrize("option", ["--page-cache", "--stats", "--scale-mode", "--activations", "--log-level"])
def test_a_wrong_choice_is_told_the_right_ones(quantload: Command, option: str) -> None:
    code, _, err = quantload("load", option, "sometimes")
    assert code == 2
    assert "sometimes" in err
    right = {"--page-cache": "drop", "--stats": "off", "--scale-mode": "mse", "--activations": "mxfp4"}
    assert right.get(option, "warning") in err


def test_the_shell_completes_names_of_schemes() -> None:
    environment = {**os.environ, "_QUANTLOAD_COMPLETE": "complete_bash", "COMP_WORDS": "quantload load -q mxfp6",
                   "COMP_CWORD": "3"}  # fmt: skip
    code = "import sys; sys.argv = ['quantload']; from quantload.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["mxfp6_e2m3", "mxfp6_e3m2"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--staging", "1KiB"),
        ("load", "--staging", "1KiB"),
        ("plan", "--kernel", "multiply=torch"),
        ("serve", "--api-key", ""),
        ("serve", "--api-key-file", "missing"),
        ("serve", "--allowed-host", "http://a.example"),
        ("serve", "--port", "99999"),
    ],
)
def test_arguments_that_make_no_sense_are_usage_errors(quantload: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = quantload(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_an_arena_larger_than_the_pieces_need_is_not_taken(quantload: Command) -> None:
    assert quantload.json("plan", "--staging", "1TiB")["staging_bytes"] <= 64 << 20


def test_a_key_that_others_see_is_warned_of(
    quantload: Command, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, _, err = quantload("serve", checkpoint("bert"), "--api-key", "sk-Zx81")
    assert "process list" in err
    assert "sk-Zx81" not in err
    (tmp_path / "key").write_text("sk-Zx81\n")
    _, _, of_file = quantload("serve", checkpoint("bert"), "--api-key-file", tmp_path / "key")
    monkeypatch.setenv("QUANTLOAD_API_KEY", "sk-Zx81 ")
    _, _, of_environment = quantload("serve", checkpoint("bert"))
    assert "white space" in of_environment
    assert "process list" not in of_file + of_environment
    monkeypatch.setenv("QUANTLOAD_API_KEY", "")
    assert quantload("serve", checkpoint("bert"))[0] == 2


def test_serving_needs_a_model_that_generates_and_a_tokenizer(quantload: Command, checkpoint: Checkpoint) -> None:
    code, _, err = quantload("serve", checkpoint("bert"), "--port", "0")
    assert code == 3
    assert "does not generate" in err
    code, _, err = quantload("serve", checkpoint("llama"), "--port", "0")
    assert code == 3
    assert "tokenizer" in err


# Exit codes


@pytest.mark.parametrize(
    "arguments",
    [
        ["load", "--no-such-option"],
        ["lode"],
        ["load", "--workers", "many"],
        ["load", "--workers", "0"],
        ["load", "-q", "mxfp5"],
        ["load", "--override", "q_proj"],
        ["load", "--kernel", "=torch"],
        ["load", "--stats", "maybe"],
        ["load", "--page-cache", "burn"],
        ["load", "--chunk", "8 parsecs"],
        ["load", "--chunk", "1"],
        ["load", "--max-memory", "-1"],
        ["load", "--device", "gpu"],
        ["load", "--device", "cuda:99"],
        ["load", "--device", "meta"],
        ["load", "--ignore", "nothing.*", "--strict"],
        ["load", "--ignore", "re:("],
        ["load", "--revision", "main"],
        ["plan", "--revision", "main"],
        ["serve", "--revision", "main"],
        ["schemes", "--device", "gpu"],
        ["report", "/no/such/report.json"],
    ],
    ids=" ".join,
)
def test_usage_is_2(arguments: list[str], quantload: Command) -> None:
    code, out, err = quantload(*arguments)
    assert (code, out) == (2, "")
    assert err.strip()


def test_a_bad_checkpoint_is_3(quantload: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    code, out, err = quantload("load", tmp_path, "--json")
    assert (code, json.loads(out)["error"]["exit_code"]) == (3, 3)
    assert "error: " in err


def test_out_of_budget_is_4(quantload: Command) -> None:
    for command in ("load", "plan"):
        code, out, err = quantload(command, "--max-memory", "1MiB")
        assert (code, out) == (4, "")
        assert "the limit is 1.000 MiB" in err


def test_anything_else_is_1(quantload: Command, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    for content in ("[]", "{}", "not json"):
        other.write_text(content)
        code, out, err = quantload("report", other)
        assert (code, out) == (2, "")
        assert "not a load report" in err
    code, _, err = quantload("load", "--kernel", "linear=aiter")
    assert code == 1
    assert "numba: can run" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [(CheckpointError, 3), (UnsafePathError, 3), (MemoryBudgetError, 4), (PolicyError, 2), (UnknownSchemeError, 2),
     (RouteError, 3), (NoKernelError, 1), (UnsupportedCheckpointError, 3), (LoadCancelledError, 1),
     (QuantloadError, 1)],
)  # fmt: skip
def test_the_code_of_every_kind_of_error(
    error: type[QuantloadError], code: int, quantload: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error("what was [given]")

    monkeypatch.setattr(commands, "app", fail)
    got, out, err = quantload()
    assert (got, out) == (code, "")
    assert "error: what was [given]" in err  # brackets are no markup here


def test_an_interrupt_is_130(quantload: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantload.load.load_quantized", interrupted)
    code, out, err = quantload("load")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"


# Places that cannot be written to


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs /dev/full")
def test_a_report_on_a_full_disk_is_an_error_without_a_traceback(quantload: Command, checkpoint: Checkpoint) -> None:
    code, out, err = quantload("load", checkpoint("llama"), "--report", FULL_DISK, "--json")
    assert code == 1
    assert list(json.loads(out)) == ["error"]
    assert "/dev/full" in err
    assert "No space left" in err


def test_a_report_that_cannot_be_written_is_an_error_before_the_load(
    quantload: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("loaded for nothing")

    monkeypatch.setattr("quantload.load.load_quantized", loaded)
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    absent = tmp_path / "no" / "such" / "folder.json"
    for path, why in ((absent, f"no folder {absent.parent}"), (tmp_path, "is a folder"), (loop, "leads nowhere")):
        code, out, err = quantload("load", "--report", path)
        assert (code, out) == (2, "")
        assert f"{path} cannot be written: " in err
        assert why in err
    code, _, err = quantload("load", "--report", tmp_path / "one", "--html", tmp_path / "one")
    assert code == 2
    assert "--report and --html are one file" in err


def run(*arguments: str, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "quantload", *arguments],
        stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs /dev/full")
def test_stdout_on_a_full_disk(tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    values = dict.fromkeys(
        ("seconds", "bytes_read", "checkpoint_bytes", "final_bytes", "peak_bytes", "staging_peak_bytes",
         "baseline_bytes", "predicted_final_bytes", "predicted_peak_bytes"), 1,
    )  # fmt: skip
    saved.write_text(json.dumps({"model": "m", "quantization": "none", "device": "cpu", **values}))
    with FULL_DISK.open("w") as full:
        done = run("report", str(saved), "--json", stdout=full)
    assert done.returncode == 1
    assert "standard output: No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), 1, "error: Input/output error"),
        (OSError(errno.EACCES, "Permission denied", "/some/where"), 1, "error: /some/where: Permission denied"),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            4,
            "no memory for the program itself: Cannot allocate memory",
        ),
        (MemoryError(), 4, "no memory for the program itself: out of memory"),
        (RuntimeError("can't start new thread"), 4, "no memory for the program itself: can't start new thread"),
        (
            CheckpointErrorForMemory("it has no tokenizer that can be loaded"),
            4,
            "error: it has no tokenizer that can be loaded",
        ),
    ],
)
def test_only_what_standard_output_refuses_is_said_of_standard_output(
    quantload: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("quantload.load.load_quantized", fail)
    found, out, err = quantload("load")
    assert (found, out) == (code, "")
    assert said in err
    assert "standard output" not in err


@pytest.mark.parametrize("place", ["print_plan", "tables"])
def test_printing_that_finds_no_memory_is_no_fault_of_standard_output(
    quantload: Command, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    module = "quantload.memory.summary" if place == "print_plan" else "quantload.cli.commands"
    monkeypatch.setattr(f"{module}.{place}", fail)
    code, _, err = quantload("plan")
    assert (code, "no memory for the program itself: Cannot allocate memory" in err) == (4, True)
    assert "standard output" not in err


def test_an_error_is_said_where_there_is_no_memory_for_colours(
    quantload: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("quantload.cli.failing.console.print", fail)
    monkeypatch.setattr("quantload.load.load_quantized", fail)
    code, _, err = quantload("load")
    assert (code, err) == (4, "error: there was no memory for the program itself: out of memory [MemoryBudgetError]\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space as Linux has them")
@pytest.mark.parametrize("mebibytes", [150, 500, 690, 700, 800, 1000, 1080, 1090, 1130])
def test_a_command_without_address_space_for_its_libraries_or_its_load_is_out_of_budget(mebibytes: int) -> None:
    import resource

    size = mebibytes << 20
    done = subprocess.run(
        [sys.executable, "-m", "quantload", "load", "--quiet"], capture_output=True, text=True, timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
    )  # fmt: skip
    assert done.returncode in (0, 4), done.stderr
    assert done.returncode or mebibytes > 1000
    assert "Traceback" not in done.stderr
    assert "standard output" not in done.stderr
    assert done.returncode == 0 or "error: there was no memory for" in done.stderr or "does not fit" in done.stderr


# Startup


WITHOUT_TORCH = """
import json, sys
for name in ("torch", "transformers", "numba", "numpy", "huggingface_hub"):
    sys.modules[name] = None  # whoever imports it fails
from quantload.cli import main
codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["quantload", *arguments]
    try:
        main()
    except SystemExit as ended:
        codes.append(ended.code or 0)
print("codes", codes)
"""


def without_torch(*commands: list[str]) -> tuple[list[int], str, str]:
    """Exit codes, stdout and stderr of commands that can import nothing large."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    out, codes = done.stdout.rsplit("codes ", 1)
    return json.loads(codes), out, done.stderr


def test_what_needs_no_torch_does_not_import_it(tmp_path: Path) -> None:
    numbers = dict.fromkeys(
        ("seconds", "bytes_read", "checkpoint_bytes", "final_bytes", "peak_bytes", "staging_peak_bytes",
         "baseline_bytes", "predicted_final_bytes", "predicted_peak_bytes"), 1,
    )  # fmt: skip
    saved = tmp_path / "report.json"
    saved.write_text(json.dumps({"model": "m", "quantization": "none", "device": "cpu", **numbers}))
    page = str(tmp_path / "page.html")
    codes, out, err = without_torch(
        ["--version"], ["--help"], ["load", "--help"], ["report", str(saved)], ["report", str(saved), "--html", page]
    )
    assert (codes, err) == ([0] * 5, "")
    assert "--max-memory" in out


def test_a_model_that_is_not_there_is_told_before_anything_is_imported(tmp_path: Path) -> None:
    missing, empty = f"{tmp_path}/missing", tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text"
    text.write_text("words " * 4096)
    more = {"generate": ["--prompt", "x"], "convert": [str(tmp_path / "out")], "eval": ["--text", str(text)]}
    commands = ("load", "plan", "compare", "serve", "generate", "convert", "eval")
    codes, out, err = without_torch(
        *([command, model, *more.get(command, [])] for command in commands for model in (missing, str(empty)))
    )
    assert (codes, out) == ([3] * 14, "")
    assert err.count(f"{missing!r} is no folder here") == 7
    assert err.count("has no config.json") == 7


def test_help_lists_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("load", "plan", "serve", "schemes", "report"):
        assert f" {command} " in done.stdout
