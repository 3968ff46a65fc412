"""`bench/fuzz.py`: some of its inputs in every run of the tests, and that what is faulty is found."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import fuzz as bench
import fuzz_coverage
import fuzz_mutations
import pytest
from fuzz_faulty import FaultyReader

QUICK = {
    "header": 1000,
    "index": 600,
    "config": 60,
    "quantization_config": 300,
    "generation_config": 60,
    "tokenizer": 8,
}


@pytest.mark.parametrize(("name", "count"), QUICK.items())
def test_what_is_spoilt_is_read_right_or_refused_with_a_reason(name: str, count: int, tmp_path: Path) -> None:
    reader, rng = bench.make_reader(name, tmp_path), random.Random(7)
    corpus, counts = reader.corpus(), Counter[str]()
    for _ in range(count):
        data, where = reader.mutate(rng, rng.choice(corpus), corpus)
        kind, said = bench.judge(reader, data)
        assert kind in ("read", "refused"), f"{where}: {kind}: {said}"
        counts[kind] += 1
    assert min(counts["read"], counts["refused"]) > 0


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", "--scale", "0.05", "--seed", "11", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 0, capsys.readouterr().out
    (path,) = tmp_path.glob("fuzz-20*-part.json")
    result = json.loads(path.read_text())
    assert {each["reader"]: each["inputs"] for each in result["results"]} == {
        name: round(total * 0.05) for name, (total, _) in bench.COUNTS.items()
    }
    for each in result["results"]:
        assert sum(each["counts"].values()) == each["inputs"]


@pytest.mark.slow
def test_faults_are_found() -> None:
    result = bench.measure("faulty", seed=1, scale=1)
    found = Counter(fault["kind"] for fault in result["faults"])
    assert {"raw error", "wrong", "message", "memory", "hang", "died"} == set(found)
    assert sum(result["counts"].values()) == result["inputs"]
    assert sum(found.values()) == sum(result["counts"][kind] for kind in found)


def test_each_error_has_its_kind(tmp_path: Path) -> None:
    reader = FaultyReader(tmp_path)
    judged = {
        kind: bench.judge(reader, kind.encode())[0] for kind in ("raw error", "wrong", "message", "refused", "read")
    }
    assert judged == {kind: kind for kind in judged}


def test_mutations_are_a_function_of_the_seed() -> None:
    data = json.dumps({"a": [1, 2, {"b": "text"}], "c": None}).encode()
    runs = [
        [fuzz_mutations.mutate_json(rng, data, [data], ("a", "x")) for _ in range(200)]
        for rng in (random.Random(3), random.Random(3))
    ]
    assert runs[0] == runs[1]
    assert len({changed for changed, _ in runs[0]}) > 100


def test_lines_count_as_new_once() -> None:
    lines = fuzz_coverage.NewLines("fuzz_mutations")
    with lines:
        list(fuzz_mutations.places({"a": 1}))
    first = lines.found
    with lines:
        list(fuzz_mutations.places({"a": 1}))
    assert first > 3
    assert lines.found == 0
    assert lines.total == first
