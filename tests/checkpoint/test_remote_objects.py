"""What obstore's answers and errors become: files over HTTP and S3 from a server on this machine."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from quantload.addresses import parse_address
from quantload.checkpoint.remote.client import (
    ChangedError,
    MissingError,
    PassingError,
    PassingKind,
    RefusedError,
    Tag,
)
from quantload.checkpoint.resolve import resolve
from quantload.errors import CheckpointError, PolicyError, UnsupportedCheckpointError
from range_server import Fault, RangeServer

pytest.importorskip("obstore")
from quantload.checkpoint.remote.objects import ObjectClient
from quantload.checkpoint.remote.upload import upload_to

CONTENT = bytes(range(256)) * 4000
SECRET = "hunter2"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(CONTENT)
    (tmp_path / "model" / "empty").write_bytes(b"")
    server = RangeServer(tmp_path)
    with server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def client(server: RangeServer, scheme: str, stall_seconds: float = 60.0) -> ObjectClient:
    base = f"http://me:{SECRET}@127.0.0.1:{server.port}" if scheme == "http" else "s3://bucket"
    return ObjectClient(parse_address(f"{base}/model"), stall_seconds)


def get(
    client: ObjectClient, name: str = "a", start: int = 0, stop: int = len(CONTENT), tag: Tag | None = None
) -> bytes:
    return b"".join(client.get(name, start, stop, tag).chunks)


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_ranges_and_versions(server: RangeServer, scheme: str) -> None:
    one = client(server, scheme)
    assert get(one, "a", 1000, 600_000) == CONTENT[1000:600_000]
    assert get(one, "a", 1_023_000, 9_999_999) == CONTENT[1_023_000:]
    tag = one.get("a", 0, 1, None).tag
    assert tag.size == len(CONTENT)
    assert get(one, "a", 5, 10, tag) == CONTENT[5:10]
    assert one.get("empty", 0, 10, None) == (Tag(0), ())
    with pytest.raises(MissingError):
        get(one, "gone")
    (server.root / "model" / "a").write_bytes(CONTENT[::-1])
    with pytest.raises(ChangedError):
        get(one, "a", 5, 10, tag)
    assert one.names() == (["a", "empty"] if scheme == "s3" else None)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(status=503), "throttled"),
        (Fault(status=429), "throttled"),
        (Fault(status=500), "server_error"),
        (Fault(status=504), "server_error"),
        (Fault(after=1000, how="reset"), "connection"),
        (Fault(after=1000, how="close"), "connection"),
        (Fault(after=0, how="reset"), "connection"),
        (Fault(after=1000, how="stall", seconds=60), "stalled"),
        (Fault(how="shift"), "wrong_range"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_what_may_pass(server: RangeServer, fault: Fault, kind: PassingKind, scheme: str) -> None:
    server.fault = lambda asked: fault
    with pytest.raises(PassingError) as caught:
        get(client(server, scheme, stall_seconds=0.2 if fault.how == "stall" else 60.0))
    assert caught.value.kind == kind
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "said", "credentials"),
    [
        (Fault(status=401), "HTTP 401", True),
        (Fault(status=403), "HTTP 403, SlowDown", True),
        (Fault(status=400, body=b"<Error><Code>ExpiredToken</Code></Error>"), "HTTP 400, ExpiredToken", True),
        (Fault(how="whole"), "does not send parts of a file", False),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_what_will_not_pass(server: RangeServer, fault: Fault, said: str, credentials: bool, scheme: str) -> None:
    server.fault = lambda asked: fault
    with pytest.raises(RefusedError, match=said) as caught:
        get(client(server, scheme), start=10)
    assert caught.value.credentials == credentials
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("http://HOST/model", "give a user and a password in the URL, or a signed URL"),
        ("http://me:hunter2@HOST/model", "what the URL gave: the user and the password; check"),
        ("http://hunter2@HOST/model", "what the URL gave: the user; check"),
        ("http://HOST/model?sig=hunter2", "what the URL gave: the query, which may be a signature that has expired; c"),
        ("s3://bucket/model", r"AWS_SKIP_SIGNATURE=true .* \(what AWS_ACCESS_KEY_ID gave was refused\)"),
    ],
)
@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_were_given_and_refused_are_not_asked_for(
    server: RangeServer, given: str, said: str, status: int
) -> None:
    server.fault = lambda asked: Fault(status=status)
    server.lists = False
    with pytest.raises(CheckpointError, match=f"HTTP {status}.*; .*{said}") as caught:
        resolve(given.replace("HOST", f"127.0.0.1:{server.port}"))
    assert SECRET not in str(caught.value)
    assert ("give a user" in str(caught.value)) == (given == "http://HOST/model")


def test_a_bucket_that_is_not_there_is_named_by_the_code_of_s3(server: RangeServer) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve("s3://bucket9/m/ok")
    assert str(caught.value) == "s3://bucket9/m/ok: no such folder (HTTP 404, NoSuchBucket); check the address"


@pytest.mark.parametrize("given", ["s3://", "gs:///", "az://", "http://", "https:///m", "abfss://c@"])
def test_an_address_without_a_place_is_not_asked_for(given: str) -> None:
    with pytest.raises(CheckpointError, match=r"names no .*; give an address of the form"):
        resolve(given)
    with pytest.raises(PolicyError, match=r"give an address of the form|cannot be written to"):
        upload_to(given)


def test_a_slow_server_is_not_given_up(server: RangeServer) -> None:
    server.fault = lambda asked: Fault(how="slow", seconds=0.005)
    assert get(client(server, "s3")) == CONTENT


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(PassingError, match="cannot be reached"):
        get(ObjectClient(parse_address("http://127.0.0.1:1/model")))


def test_credentials_are_sent_and_not_shown(server: RangeServer) -> None:
    one = client(server, "http")
    get(one)
    assert server.asked[0].headers["authorization"] == f"Basic {base64.b64encode(b'me:hunter2').decode()}"
    assert one.shown == f"{server.url}/model"


def test_a_signed_address_keeps_its_signature(server: RangeServer) -> None:
    one = ObjectClient(parse_address(f"{server.url}/model?sig={SECRET}"))
    assert get(one, "a", 5, 10) == CONTENT[5:10]
    assert SECRET not in one.shown


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_403_is_how_some_servers_say_that_a_file_is_missing(server: RangeServer, scheme: str) -> None:
    server.lists = False
    server.fault = lambda asked: Fault(status=403) if asked.path.endswith("gone") else None
    one = client(server, scheme)
    assert one.names() is None
    with pytest.raises(RefusedError):
        get(one, "gone")
    get(one, "a", 0, 1)
    with pytest.raises(MissingError):
        get(one, "gone")
    with pytest.raises(RefusedError):
        get(one, "gone", tag=Tag(5))


@pytest.mark.parametrize("given", ["s3n://bucket/model", "file:///model", "nothing://host/model"])
def test_other_schemes_say_which_there_are(given: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=r"nothing here reads \w+://; give one of .*s3://"):
        resolve(given)


def test_a_bad_address_shows_no_password() -> None:
    with pytest.raises((CheckpointError, UnsupportedCheckpointError)) as caught:
        resolve(f"https://me:{SECRET}@[::1/model")
    assert SECRET not in str(caught.value)


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(UnsupportedCheckpointError, match=r"pip install 'quantload\[objects\]'"):
        resolve("s3://bucket/model")
