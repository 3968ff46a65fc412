"""`bench/bigger_than_memory.py`: the checkpoint it makes, that it cleans up, and what it concludes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import bigger_than_memory as bench
import checkpoints
import pytest
from recipes import Recipe, moe, qwen3_30b


def small(layers: int = 48) -> Recipe:
    return moe(0.002)


def test_the_checkpoint_is_the_published_one() -> None:
    recipe = qwen3_30b()
    assert recipe.tensor_bytes == 61_064_245_248  # the total_size of the published index
    assert len(recipe.tensors) == 18_867
    assert recipe.tensors["model.layers.47.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert recipe.tensors["model.layers.0.self_attn.q_proj.weight"] == (4096, 2048)
    assert recipe.shards == 16


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    monkeypatch.setattr(bench, "qwen3_30b", small)
    monkeypatch.setattr(bench, "set_page_cache", lambda *_, **__: 0.0)  # a test folder may be on a disk without one
    command = ["bench", "--dir", str(tmp_path / "work"), "--results", str(results), "--layers", "1", "--no-generate"]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    (path,) = results.glob("bigger_than_memory-20*-1-layers.json")
    result = json.loads(path.read_text())
    assert [run["loader"] for run in result["runs"]] == [*bench.FLOORS, bench.SCHEME, *bench.FLOORS]
    assert all(run["status"] == "ok" for run in result["runs"])
    assert list((tmp_path / "work").iterdir()) == []
    peak, _ = bench.goals_of(result)
    assert peak.met is True
    out = capsys.readouterr().out
    assert "| modules quantized | 5 |" in out
    assert "| weights quantized | linear 100%, expert 100% |" in out


def test_a_short_disk_is_a_line_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "DISK_MARGIN", 1 << 60)
    monkeypatch.setattr(sys, "argv", ["bench", "--dir", str(tmp_path), "--results", str(tmp_path / "results")])
    bench.main()
    assert capsys.readouterr().out.startswith("skipped: ")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_removes_the_checkpoint(tmp_path: Path) -> None:
    def interrupted() -> None:
        with bench.checkpoint(small(), tmp_path, keep=False) as folder:
            assert checkpoints.shards_of(folder)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_kept_checkpoint_is_found_again_and_left(tmp_path: Path) -> None:
    with bench.checkpoint(small(), tmp_path, keep=True) as folder:
        first = checkpoints.shards_of(folder)[0].stat().st_mtime_ns
    bench.remove_stale(tmp_path)
    with bench.checkpoint(small(), tmp_path, keep=False) as again:
        assert again == folder
        assert checkpoints.shards_of(again)[0].stat().st_mtime_ns == first
    assert folder.exists()


def test_what_a_killed_run_left_is_removed_and_a_running_one_left_alone(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name, owner in (("dead", dead.pid), ("running", os.getpid())):
        (tmp_path / f"{bench.PREFIX}-{name}").mkdir()
        (tmp_path / f"{bench.PREFIX}-{name}" / bench.OWNER).write_text(str(owner))
    (tmp_path / f"{bench.PREFIX}-without").mkdir()
    (tmp_path / "dense-1").mkdir()
    bench.remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{bench.PREFIX}-running", "dense-1"]


def test_a_load_that_failed_misses_the_goal() -> None:
    run = {"loader": bench.SCHEME, "status": "killed", "detail": "needs more than 1.0 GB of anonymous memory"}
    (goal,) = bench.goals_of({"runs": [run]})
    assert (goal.met, goal.reached) == (False, run["detail"])
