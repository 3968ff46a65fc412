"""A real S3 server, moto's: loads from it, conversions into it, and versions of objects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quantload import LoadOptions, convert_checkpoint, load_quantized
from quantload.checkpoint.remote.upload import PART_BYTES
from quantload.errors import CheckpointError, OutputError

pytestmark = pytest.mark.compat
server = pytest.importorskip("moto.server", reason="moto is not installed")
boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
pytest.importorskip("obstore")

OPTIONS = LoadOptions(digest=True)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(endpoint: str, golden: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket with a model below `models/llama`."""
    settings = {
        "AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hunter2",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    for path in (golden / "bf16_llama").iterdir():
        client.upload_file(str(path), "bucket", f"models/llama/{path.name}")
    yield client
    for each in client.list_objects_v2(Bucket="bucket").get("Contents", ()):
        client.delete_object(Bucket="bucket", Key=each["Key"])
    client.delete_bucket(Bucket="bucket")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("scheme", ["quark_mxfp4", "fp8_per_tensor", "int8_per_channel"])
def test_a_load_from_a_bucket(golden: Path, scheme: str) -> None:
    local = load_quantized(golden / "bf16_llama", scheme, options=OPTIONS).load_report
    remote = load_quantized("s3://bucket/models/llama", scheme, options=OPTIONS).load_report
    assert remote.digest == local.digest
    assert remote.source_retries == 0


def test_a_conversion_into_a_bucket(bucket: Any, golden: Path, tmp_path: Path) -> None:
    convert_checkpoint(golden / "bf16_llama", tmp_path / "out", "fp8_per_channel", format="compressed-tensors")
    convert_checkpoint("s3://bucket/models/llama", "s3://bucket/made", "fp8_per_channel", format="compressed-tensors")
    for path in (tmp_path / "out").iterdir():
        if path.name != "README.md":  # it says where the original is
            content = bucket.get_object(Bucket="bucket", Key=f"made/{path.name}")["Body"].read()
            assert content == path.read_bytes(), path.name
    with pytest.raises(OutputError, match=r"has a config\.json already"):
        convert_checkpoint("s3://bucket/models/llama", "s3://bucket/made", "fp8_per_channel")


def test_an_object_in_parts(bucket: Any, tmp_path: Path) -> None:
    from quantload.addresses import parse_address
    from quantload.checkpoint.remote.objects import open_store

    content = bytes(range(256)) * (2 * PART_BYTES // 256 + 1000)
    (tmp_path / "large").write_bytes(content)
    open_store(parse_address("s3://bucket/parts")).put("large", tmp_path / "large", chunk_size=PART_BYTES)
    assert bucket.get_object(Bucket="bucket", Key="parts/large")["Body"].read() == content


@pytest.mark.usefixtures("bucket")
def test_a_bucket_or_a_folder_that_is_not_there() -> None:
    for url in ("s3://bucket/models/none", "s3://none/models"):
        with pytest.raises(CheckpointError, match=r"no such folder|config\.json") as caught:
            load_quantized(url, "quark_mxfp4")
        assert "hunter2" not in str(caught.value)
