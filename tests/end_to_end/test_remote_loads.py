"""Checkpoints that are read from a server: the bytes of a local load, and nothing of them on this disk."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import big_checkpoints
import fsspec
import huggingface_hub.constants
import pytest
import raw_checkpoint
from process_state import MIB, threads
from quantized_copies import METHODS, quantized_copy
from quantload import LoadOptions, convert_checkpoint, load_quantized
from quantload.checkpoint.remote import requests as requests_module
from quantload.checkpoint.remote import upload
from quantload.errors import ChangedFileError, CheckpointError, OutputError, PolicyError
from quantload.memory.report import LoadReport
from quantload.planning import plan_quantized
from range_server import Asked, Fault, RangeServer

pytest.importorskip("obstore")

Checkpoint = Callable[[str], Path]
ONE_WORKER = LoadOptions(workers=1)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """An empty server; its folders are models. Whatever a load leaves on this disk is left in `temporary`."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(requests_module, "FIRST_PAUSE", 0.001)
    (tmp_path / "served").mkdir()
    with RangeServer(tmp_path / "served") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for constant, there in server.of_hub().items():
            monkeypatch.setattr(huggingface_hub.constants, constant, there)
        yield server
        assert list(temporary.iterdir()) == []


def url(server: RangeServer, scheme: str) -> str:
    return {"http": f"{server.url}/model", "s3": "s3://bucket/model", "hf": "hf://org/model"}[scheme]


def serve(server: RangeServer, folder: Path, shards: int = 1) -> Path:
    """A copy of a checkpoint, over so many shards."""
    if shards == 1:
        return Path(shutil.copytree(folder, server.root / "model"))
    tensors = raw_checkpoint.read(folder)
    names = list(tensors)
    parts = [{name: tensors[name] for name in names[number::shards]} for number in range(shards)]
    return raw_checkpoint.write(server.root / "model", folder, parts)


def digest(model: str | Path, scheme: str, options: LoadOptions | None = None) -> str | None:
    given = LoadOptions(digest=True, chunk_bytes=64 << 10, workers=2) if options is None else options
    return load_quantized(model, scheme, options=given).load_report.digest


QUICK = [
    ("qwen3_moe", "fp8_per_tensor", "s3", 3),
    ("gpt2", "int8_per_channel", "http", 1),
    ("llama", "mxfp4_rows", "hf", 2),
]
SLOW = [
    (name, scheme, kind, 2)
    for name in ("llama", "qwen3_moe", "gpt_oss", "gpt2", "qwen3_vl_moe", "deepseek_v3")
    for scheme in ("quark_mxfp4", "fp8_per_tensor", "fp8_per_block", "int8_per_channel", "none")
    for kind in ("http", "s3", "hf")
]


@pytest.mark.parametrize(
    ("name", "scheme", "kind", "shards"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_a_load_from_a_server_ends_in_the_bytes_of_a_local_one(
    name: str, scheme: str, kind: str, shards: int, checkpoint: Checkpoint, server: RangeServer
) -> None:
    before = threads()  # a server of another test has its own
    folder = serve(server, checkpoint(name), shards)
    assert digest(url(server, kind), scheme) == digest(folder, scheme)
    assert [name for name in threads() - before if name.startswith("quantload")] == []
    assert server.asked


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_checkpoint_on_a_server(
    method: str, checkpoint: Checkpoint, server: RangeServer, tmp_path: Path
) -> None:
    quantize, config = METHODS[method]
    quantized, _ = quantized_copy(tmp_path, checkpoint("llama"), quantize, config)
    folder = serve(server, quantized)
    for scheme in ("auto", "quark_mxfp4"):
        assert digest(url(server, "s3"), scheme) == digest(folder, scheme)


def test_a_file_system_of_fsspec(checkpoint: Checkpoint) -> None:
    files, folder = fsspec.filesystem("memory"), checkpoint("llama")
    files.put(str(folder), "/model", recursive=True)
    try:
        assert digest("memory://model", "quark_mxfp4") == digest(folder, "quark_mxfp4")
    finally:
        files.store.clear()


def test_a_plan_reads_headers_alone(checkpoint: Checkpoint, server: RangeServer) -> None:
    folder = serve(server, checkpoint("llama"), 2)
    draft = plan_quantized(url(server, "http"), "quark_mxfp4")
    local = plan_quantized(folder, "quark_mxfp4")
    assert draft.plan.memory.final_bytes == local.plan.memory.final_bytes
    assert draft.plan.memory.peak_bytes > local.plan.memory.peak_bytes, "what is fetched ahead counts"
    assert draft.plan.fetches is not None
    assert draft.plan.fetches.needed_bytes <= draft.plan.fetches.fetched_bytes <= 1.05 * draft.plan.bytes_total
    assert local.plan.fetches is None
    assert all(asked.start == 0 for asked in server.asked)
    assert not any("token" in asked.path for asked in server.asked)


def test_errors_of_all_kinds_on_the_way_change_no_byte(checkpoint: Checkpoint, server: RangeServer) -> None:
    folder = serve(server, checkpoint("llama"), 2)
    chance = random.Random(7)
    faults = [
        *(Fault(status=503), Fault(status=429), Fault(status=500), Fault(how="shift")),
        *(Fault(after=0, how="reset"), Fault(after=-1, how="reset"), Fault(after=-1, how="close")),
    ]

    def fault(asked: Asked) -> Fault | None:
        one = chance.choice(faults)
        after = chance.randrange(max(asked.stop - asked.start, 1)) if one.after < 0 else one.after
        trouble = Fault(one.status, one.body, after, one.how)
        return trouble if asked.before < 3 and chance.random() < 0.5 else None

    server.fault = fault
    options = LoadOptions(digest=True, chunk_bytes=64 << 10)
    report = load_quantized(url(server, "http"), "quark_mxfp4", options=options).load_report
    assert report.digest == digest(folder, "quark_mxfp4")
    counted = {each.result: each.count for each in report.source_requests}
    assert report.source_retries == sum(counted.values()) - counted["ok"] - counted["missing"] > 0
    assert LoadReport.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_storm_that_does_not_end_is_an_error_without_credentials(
    kind: str, checkpoint: Checkpoint, server: RangeServer
) -> None:
    serve(server, checkpoint("llama"))
    server.fault = lambda asked: Fault(status=503) if asked.path.endswith(".safetensors") and asked.start else None
    where = url(server, kind).replace("http://", "http://me:hunter2@") + ("?sig=hunter2" if kind == "http" else "")
    with pytest.raises(CheckpointError, match="after 3 tries in a row: HTTP 503, SlowDown") as caught:
        digest(where, "quark_mxfp4", LoadOptions(retries=2))
    assert "hunter2" not in "".join(map(str, (caught.value, *getattr(caught.value, "__notes__", ()))))
    assert caught.value.__cause__ is None


def test_a_token_that_expires_is_an_error_at_once(checkpoint: Checkpoint, server: RangeServer) -> None:
    serve(server, checkpoint("llama"))
    expired = Fault(status=400, body=b"<Error><Code>ExpiredToken</Code></Error>")
    server.fault = lambda asked: expired if asked.path.endswith(".safetensors") and asked.start else None
    with pytest.raises(CheckpointError, match="HTTP 400, ExpiredToken; set AWS_ACCESS_KEY_ID"):
        digest(url(server, "s3"), "quark_mxfp4")


@pytest.mark.parametrize("kind", ["http", "s3"])
@pytest.mark.parametrize("etags", [True, False])
def test_an_object_that_is_replaced_half_way_is_an_error(
    kind: str, etags: bool, checkpoint: Checkpoint, server: RangeServer
) -> None:
    folder = serve(server, checkpoint("llama"))
    server.etags = etags
    shard = folder / "model.safetensors"
    content = shard.read_bytes()

    def replace(asked: Asked) -> None:
        if asked.path.endswith(".safetensors") and asked.start:
            shard.write_bytes(content if etags else content + b"x")

    server.fault = replace
    with pytest.raises(ChangedFileError, match=r"model.safetensors: changed at .* while it was read"):
        digest(url(server, kind), "quark_mxfp4")


def test_a_config_that_is_replaced_meanwhile_is_an_error(checkpoint: Checkpoint, server: RangeServer) -> None:
    folder = serve(server, checkpoint("llama"))
    config = folder / "config.json"

    def touch(asked: Asked) -> None:
        if asked.start:
            os.utime(config)

    server.fault = touch
    with pytest.raises(ChangedFileError, match=r"config\.json: changed"):
        digest(url(server, "s3"), "quark_mxfp4")


def test_a_folder_without_a_model_says_what_is_missing(checkpoint: Checkpoint, server: RangeServer) -> None:
    with pytest.raises(CheckpointError, match=r"s3://bucket/model has no config\.json"):
        digest("s3://bucket/model", "quark_mxfp4")
    folder = serve(server, checkpoint("llama"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"/model has a config\.json, but neither model\.safetensors nor"):
        digest(url(server, "http"), "quark_mxfp4")


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_cached_load_is_found_again_by_the_version_that_the_server_tells(
    kind: str, checkpoint: Checkpoint, server: RangeServer, tmp_path: Path
) -> None:
    folder = serve(server, checkpoint("llama"))
    options = LoadOptions(digest=True, cache=tmp_path / "cache")
    reports = []
    for _ in range(2):
        reports.append(load_quantized(url(server, kind), "quark_mxfp4", options=options).load_report)
    assert [report.cache for report in reports] == ["written", "hit"]
    assert reports[0].digest == reports[1].digest
    os.utime(folder / "model.safetensors")
    again = load_quantized(url(server, kind), "quark_mxfp4", options=options).load_report
    assert again.cache == "written"


def test_versions_that_are_told_alike_of_two_addresses_are_two_entries(
    checkpoint: Checkpoint, server: RangeServer, tmp_path: Path
) -> None:
    """An ETag, or a date and a size, tell versions of one address apart: another may have the same."""
    server.of_times = True
    first = serve(server, checkpoint("llama"))
    second = Path(shutil.copytree(first, server.root / "twin"))
    weights = second / "model.safetensors"
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[-4096:] = bytes(4096)
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    options = LoadOptions(digest=True, cache=tmp_path / "cache")
    found = [load_quantized(f"{server.url}/{name}", "quark_mxfp4", options=options) for name in ("model", "twin")]
    assert [each.load_report.cache for each in found] == ["written", "written"]
    assert found[0].load_report.digest != found[1].load_report.digest


def test_a_conversion_from_a_server_writes_the_files_of_a_local_one(
    checkpoint: Checkpoint, server: RangeServer, tmp_path: Path
) -> None:
    folder = serve(server, checkpoint("llama"), 2)
    (folder / "LICENSE").write_text("terms")
    for model, out in ((folder, "local"), ("s3://bucket/model", "remote")):
        convert_checkpoint(model, tmp_path / out, "quark_mxfp4", format="quark", progress=False)
    written = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("local", "remote")]
    cards = [files.pop("README.md").replace(str(folder).encode(), b"s3://bucket/model") for files in written]
    assert written[0] == written[1]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("part_bytes", [8 << 20, 5 << 10])
def test_a_conversion_into_a_bucket_writes_the_files_of_a_local_one(
    part_bytes: int, checkpoint: Checkpoint, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "PART_BYTES", part_bytes)
    sizes: dict[str, Any] = {"format": "compressed-tensors", "max_shard_bytes": 20_000, "progress": False}
    convert_checkpoint(checkpoint("llama"), tmp_path / "out", "fp8_per_channel", **sizes)
    report = convert_checkpoint(checkpoint("llama"), "s3://bucket/made/here", "fp8_per_channel", **sizes)
    written = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "out", server.root / "made" / "here")
    ]
    assert written[0] == written[1]
    assert len(written[0]) > 5
    assert report.output == "s3://bucket/made/here"
    assert report.output_bytes == sum(map(len, written[0].values()))
    assert next(asked.path for asked in reversed(server.asked) if asked.method != "HEAD").endswith("config.json")
    with pytest.raises(OutputError, match=r"s3://bucket/made/here has a config\.json already"):
        convert_checkpoint(checkpoint("llama"), "s3://bucket/made/here", "fp8_per_channel", **sizes)


def test_a_conversion_into_a_bucket_goes_on_where_it_was(checkpoint: Checkpoint, server: RangeServer) -> None:
    sizes: dict[str, Any] = {"format": "compressed-tensors", "max_shard_bytes": 20_000, "progress": False}
    refused = ["model-00003"]
    server.fault = lambda asked: Fault(status=403) if any(name in asked.path for name in refused) else None
    with pytest.raises(OutputError, match=r"cannot be written: HTTP 403, SlowDown; check credentials"):
        convert_checkpoint(checkpoint("llama"), "s3://bucket/made", "fp8_per_channel", options=ONE_WORKER, **sizes)
    first = [asked.path for asked in server.asked if asked.method == "PUT"]
    refused.clear()
    server.asked.clear()
    convert_checkpoint(checkpoint("llama"), "s3://bucket/made", "fp8_per_channel", options=ONE_WORKER, **sizes)
    then = [asked.path for asked in server.asked if asked.method == "PUT"]
    done = [path for path in first if "model-00003" not in path]
    assert done
    assert set(done).isdisjoint(then)
    assert (server.root / "made" / "config.json").exists()


@pytest.mark.parametrize("out", ["https://host/model", "hf://org/model", "memory://model"])
def test_what_cannot_be_written_to(out: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(PolicyError, match="cannot be written to; give a folder, or one of s3://"):
        convert_checkpoint(checkpoint("llama"), out, "fp8_per_channel")


def test_a_plan_says_what_is_fetched_twice(server: RangeServer) -> None:
    big_checkpoints.llama(server.root / "model", hidden_size=256, intermediate_size=4096, num_hidden_layers=1)
    options = LoadOptions(chunk_bytes=256 << 10, staging_bytes=4 * MIB, workers=1, connections=1)
    draft = plan_quantized(url(server, "s3"), "fp8_per_tensor", options=options)
    report = load_quantized(url(server, "s3"), "fp8_per_tensor", options=options).load_report
    fetches = draft.plan.fetches
    assert fetches is not None
    assert report.source_bytes is not None
    assert fetches.fetched_bytes > 1.5 * fetches.needed_bytes
    assert fetches.fetched_bytes <= report.source_bytes < fetches.fetched_bytes + MIB


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"connections": 16}, {"staging_bytes": 32 * MIB}])
def test_the_bound_counts_what_the_library_holds(
    options: dict[str, int], server: RangeServer, checkpoint: Checkpoint
) -> None:
    from test_memory_bound import measure

    big_checkpoints.llama(
        server.root / "model", shards=2, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8
    )
    shutil.copytree(checkpoint("llama"), server.root / "tiny")
    found = measure(
        "s3://bucket/model", "quark_mxfp4", {"workers": 2, **options}, "s3://bucket/tiny",
        environment=server.environment,
    )  # fmt: skip
    report = found.report
    assert found.peak <= report["predicted_peak_bytes"]
