"""Repositories of the hub in ranges, from a stand-in of the hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from quantload.checkpoint.remote.client import MissingError, PassingError, PassingKind, RefusedError, Tag
from quantload.checkpoint.remote.hub import HubClient
from quantload.checkpoint.resolve import resolve
from quantload.errors import CheckpointError
from range_server import COMMIT, Fault, RangeServer

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(CONTENT)
    (tmp_path / "model" / "empty").write_bytes(b"")
    with RangeServer(tmp_path) as server:
        for name, value in server.of_hub().items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hunter2")
        yield server


def get(client: HubClient, name: str = "a", start: int = 0, stop: int = len(CONTENT)) -> bytes:
    return b"".join(client.get(name, start, stop, None).chunks)


def test_ranges_of_one_commit(hub: RangeServer) -> None:
    client = HubClient("org/model", "main")
    assert get(client, "a", 1000, 600_000) == CONTENT[1000:600_000]
    assert get(client, "a", 1_023_000, 9_999_999) == CONTENT[1_023_000:]
    assert client.get("a", 5, 10, None).tag == Tag(len(CONTENT), version=COMMIT)
    assert client.get("empty", 0, 10, None) == (Tag(0, version=COMMIT), ())
    with pytest.raises(MissingError):
        get(client, "gone")
    assert client.names() == ["a", "empty"]
    files = [asked for asked in hub.asked if "resolve" in asked.path]
    assert all(COMMIT in asked.path and asked.headers["authorization"] == "Bearer hunter2" for asked in files)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(status=503), "throttled"),
        (Fault(status=429), "throttled"),
        (Fault(status=500), "server_error"),
        (Fault(after=1000, how="reset"), "connection"),
        (Fault(after=1000, how="close"), "connection"),
        (Fault(after=1000, how="stall", seconds=60), "stalled"),
        (Fault(how="shift"), "wrong_range"),
    ],
)
def test_what_may_pass(hub: RangeServer, fault: Fault, kind: PassingKind) -> None:
    client = HubClient("org/model", None, stall_seconds=60.0)
    client._stall_seconds = 0.2 if fault.how == "stall" else 60.0
    hub.fault = lambda asked: fault
    with pytest.raises(PassingError) as caught:
        get(client)
    assert caught.value.kind == kind


def test_a_signed_address_is_asked_for_once_and_again_when_it_has_expired(hub: RangeServer) -> None:
    client, hub.redirects = HubClient("org/model", None), True
    for start in range(0, 5000, 1000):
        assert get(client, "a", start, start + 1000) == CONTENT[start : start + 1000]
    resolved = [asked for asked in hub.asked if asked.path.startswith("org/")]
    signed = [asked for asked in hub.asked if asked.path.startswith("signed/")]
    assert (len(resolved), len(signed)) == (1, 5)
    assert not any("authorization" in asked.headers for asked in signed)
    hub.fault = lambda asked: Fault(status=403) if asked.start == 7000 and not asked.before else None
    with pytest.raises(PassingError, match="a signed address that has expired") as caught:
        get(client, "a", 7000, 8000)
    assert "hunter2" not in str(caught.value)
    assert get(client, "a", 7000, 8000) == CONTENT[7000:8000]
    assert len([asked for asked in hub.asked if asked.path.startswith("org/")]) == 2


@pytest.mark.parametrize("status", [401, 403])
def test_what_will_not_pass(hub: RangeServer, status: int) -> None:
    client = HubClient("org/model", None)
    hub.fault = lambda asked: Fault(status=status)
    with pytest.raises(RefusedError) as caught:
        get(client)
    assert caught.value.credentials
    assert "hunter2" not in str(caught.value)


def test_a_small_file_may_come_whole(hub: RangeServer) -> None:
    client = HubClient("org/model", None)
    hub.fault = lambda asked: Fault(how="whole")
    assert get(client, "a", 300, 500_000) == CONTENT[300:500_000]


@pytest.mark.parametrize(
    ("given", "revision", "said"),
    [
        ("hf://org/gone", None, "is no repository on the hub"),
        ("hf://org/model@v9", None, "has no revision 'v9'"),
        ("hf://org/model", "v9", "has no revision 'v9'"),
        ("hf://org/model@main", "v9", "names the revision 'main', and 'v9'"),
        ("hf://datasets/org/model", None, "no address of a model"),
        ("hf://model", None, "no address of a model"),
        ("hf://org/model/folder", None, "no address of a model"),
    ],
)
def test_addresses_that_are_wrong(hub: RangeServer, given: str, revision: str | None, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        resolve(given, revision)


def test_offline_says_so(hub: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="while HF_HUB_OFFLINE is set"):
        resolve("hf://org/model")
