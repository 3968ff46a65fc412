"""`convert --fit`: the files of weights stay below a size, in schemes that the checkpoint format holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quantload import LoadOptions, QuantizationPolicy, convert_checkpoint, load_quantized
from quantload.checkpoint.resolve import resolve
from quantload.cli import DEMO_MODEL, app
from quantload.convert.planned import FilePlanner
from quantload.errors import MemoryBudgetError, PolicyError
from quantload.schemes.exported.registry import formats_of, get_export_format
from quantload.schemes.registry import ENTRIES
from typer.testing import CliRunner

HELD = {name: {each.name for each in ENTRIES if name in formats_of(each)} for name in ("quark", "compressed-tensors")}


def planner(export: str) -> FilePlanner:
    return FilePlanner(resolve(DEMO_MODEL), get_export_format(export), LoadOptions(), 4 * 10**9, False)


def sizes(export: str) -> tuple[int, int]:
    """Of the smallest checkpoint of one scheme, and of the largest."""
    found = [planner(export).plan(name, None).nbytes for name in HELD[export]]
    return min(found), max(found)


EXPORTS = ["quark", pytest.param("compressed-tensors", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("export", HELD)
def test_files_stay_below_sizes_to_lose_less_and_less(export: str) -> None:
    (low, high), losses = sizes(export), []
    for step in range(4):
        size = low + (high - low) * step // 3
        fitted = planner(export).fit("auto", None, size)
        policy = fitted.policy
        assert planner(export).plan("auto", policy).nbytes == fitted.planned_bytes <= size
        assert {policy.linear, *(scheme for _, scheme in policy.overrides)} <= HELD[export] | {"none"}
        losses.append(fitted.expected_loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 4 * losses[-1] > 0


@pytest.mark.parametrize("export", EXPORTS)
def test_what_was_fitted_is_written_and_read_back(export: str, tmp_path: Path) -> None:
    smallest, larger = (planner(export).plan(name, None).nbytes for name in ("quark_mxfp4", "mxfp6_e2m3"))
    size = (smallest + larger) // 2
    policy = QuantizationPolicy(ignore=("*.layers.0.*.o_proj",))
    report = convert_checkpoint(DEMO_MODEL, tmp_path / "out", fit=size, format=export, policy=policy, progress=False)
    files = (tmp_path / "out").glob("*.safetensors")
    assert sum(file.stat().st_size for file in files) == report.final_bytes <= size
    assert report.fit is not None
    assert (report.fit.of, report.fit.planned_bytes, report.fit.size) == ("the checkpoint", report.final_bytes, size)
    written = {layer.name: layer.format for layer in report.layers}
    assert len(set(written.values())) > 1
    read = load_quantized(tmp_path / "out", progress=False).load_report
    assert {layer.name: layer.format for layer in read.layers} == written
    assert "model.layers.0.self_attn.o_proj" not in written
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--fit {size}B --format {export} --ignore '*.layers.0.*.o_proj'" in card


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    def refused(kind: type[Exception], message: str, **arguments: object) -> None:
        with pytest.raises(kind, match=message):
            convert_checkpoint(DEMO_MODEL, tmp_path / "out", progress=False, **arguments)  # type: ignore[arg-type]

    small = r"nothing fits: with all modules in quark_mxfp4, the smallest, the checkpoint .*: give --fit 6MiB$"
    refused(MemoryBudgetError, small, fit="1MiB")
    refused(PolicyError, "say how large the files of weights may be", fit="auto")
    refused(PolicyError, "mxfp4 holds none for linear layers and experts alike", fit="9MiB", format="mxfp4")
    refused(PolicyError, "leave out the quantization", quantization="mxfp8", fit="9MiB")
    refused(PolicyError, "no module would be quantized", fit="1GiB")
    assert not (tmp_path / "out").exists()


def test_the_command_takes_a_size(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["convert", str(DEMO_MODEL), str(out), "--fit", "7MiB", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["fit"]["size"] == 7 << 20 >= report["final_bytes"]
