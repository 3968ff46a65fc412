"""`torchrun --nproc-per-node 2 -m quantload`, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from quantload.memory.report import LoadReport

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0"]


def run(*arguments: str, expected: int = 0) -> tuple[str, str]:
    """Standard output and error of both ranks together."""
    command = [*TORCHRUN, "-m", "quantload", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert (done.returncode == 0) == (expected == 0), done.stderr
    return done.stdout, done.stderr


def test_one_rank_tells_of_the_load_of_both(tmp_path: Path) -> None:
    stdout, stderr = run("load", "-q", "fp8_per_tensor", "--json", "--max-memory", "1GiB/host")
    told = json.loads(stdout)
    assert (told["rank"], told["world_size"], len(told["rank_bytes_read"])) == (0, 2, 2)
    assert stderr.count("Peak CPU memory during load_weights") == 1


def test_a_limit_of_the_host_is_that_of_both_ranks(tmp_path: Path) -> None:
    _, stderr = run("load", "--max-memory", "100MiB/host", expected=4)
    assert "the limit is 100.000 MiB" in stderr


def test_the_cache_has_an_entry_for_each_rank(tmp_path: Path) -> None:
    cache, reports = tmp_path / "cache", []
    for number in range(3):
        report = tmp_path / f"{number}.json"
        run("load", "-q", "fp8_per_channel", "--digest", "--cache", str(cache), "--report", str(report))
        reports.append(LoadReport.load(report))
        entries = [path for path in cache.iterdir() if path.is_dir()]
        assert len(entries) == 2
        if number == 1:
            damaged = max(entries[0].glob("*.safetensors"), key=lambda path: path.stat().st_size)
            content = bytearray(damaged.read_bytes())
            content[-1] ^= 1
            damaged.write_bytes(content)
    assert [report.cache for report in reports] == ["written", "hit", "rebuilt"]
    assert len({report.digest for report in reports}) == 1
