"""A source over a remote folder: a run gets the bytes that are there, out of few buffers, whatever the order."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_client import MemoryClient
from quantload.checkpoint import Barrier, Piece, PieceReader, Shard, Workspace
from quantload.checkpoint.pieces import Lines
from quantload.checkpoint.remote import requests as requests_module
from quantload.checkpoint.remote.client import PassingError, RefusedError
from quantload.checkpoint.remote.requests import Requests
from quantload.checkpoint.remote.source import RemoteSource
from quantload.checkpoint.remote.window import Sizes, choose_sizes
from quantload.errors import CheckpointError, LoadCancelledError, MissingShardError
from quantload.options import LoadOptions
from shard_files import shard_bytes

CONTENT = random.Random(5).randbytes(3 << 20)
CHUNK = 64 << 10


def run(
    client: MemoryClient, pieces: list[Piece], workers: int = 3, sizes: Sizes | None = None
) -> tuple[RemoteSource, int]:
    """Read the pieces; the source and the peak of all buffers."""
    sizes = sizes or Sizes(3, 256 << 10, 5)
    source = RemoteSource(Requests(client), lambda total: sizes)
    shards = [Shard(name, len(content)) for name, content in client.files.items()]
    totals = PieceReader(source, shards, workers=workers, chunk_bytes=CHUNK).run(pieces)
    return source, totals.staging_peak_bytes


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 4), st.integers(3, 8), st.booleans())
def test_every_piece_gets_its_bytes(seed: int, workers: int, buffers: int, twice: bool) -> None:
    chance = random.Random(seed)
    files = {"a": CONTENT, "b": CONTENT[::-1]}
    pieces: list[Piece] = []
    right: list[bool] = []

    def piece(shard: int, extents: list[tuple[int, int]] | Lines) -> Piece:
        content = list(files.values())[shard]
        expected = b"".join(content[offset : offset + length] for offset, length in extents)

        def deliver(workspace: Workspace) -> None:
            right.append(bytes(workspace.buffer.numpy()) == expected)

        return Piece(shard, extents, deliver)

    for shard in (0, 1):
        at = 0
        while at < len(CONTENT) - CHUNK:
            length = chance.choice([100, 5000, CHUNK])
            if chance.random() < 0.2 and at + 40 * 30_000 < len(CONTENT):
                pieces.append(piece(shard, Lines(at, chance.choice([300, 30_000]), 200, 40)))
            else:
                pieces.append(piece(shard, [(at, length)]))
            at += length + chance.choice([0, 0, 0, 50, 200_000])
    if twice:
        barrier = Barrier(len(pieces))
        again = [Piece(each.shard, each.extents, each.deliver, after=barrier) for each in pieces]
        for each in pieces:
            each.signal = barrier
        pieces += again
    client = MemoryClient(files, seed=chance.randrange(1000))
    run(client, pieces, workers, Sizes(buffers - 2, 64 << 10, buffers))
    assert right == [True] * len(pieces)
    assert client.most_in_flight <= buffers - 2 or client.most_in_flight == 1


def test_buffers_are_all_that_is_held() -> None:
    pieces = [Piece(0, [(at, CHUNK)], lambda workspace: None) for at in range(0, len(CONTENT), CHUNK)]
    source, peak = run(MemoryClient({"a": CONTENT}), pieces)
    assert source.staging_peak_bytes <= 5 * (256 << 10)
    assert peak <= 5 * (256 << 10) + 3 * 2 * CHUNK
    assert client_bytes(source) == len(CONTENT)


def client_bytes(source: RemoteSource) -> int:
    return source._requests.counters.nbytes - 1  # one to learn the size


def test_requests_are_of_many_pieces() -> None:
    client = MemoryClient({"a": CONTENT})
    run(client, [Piece(0, [(at, 9000)], lambda workspace: None) for at in range(0, len(CONTENT) - 9000, 9000)])
    assert len(client.asked) <= len(CONTENT) // (256 << 10) + 2


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_ends_the_run_and_all_threads(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "FIRST_PAUSE", 0.0)
    client = MemoryClient({"a": CONTENT})
    client.trouble = lambda name, start, stop: (9, RefusedError("HTTP 403")) if start > 1 << 20 else None
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="HTTP 403"):
        run(client, [Piece(0, [(at, CHUNK)], lambda _: None) for at in range(0, len(CONTENT), CHUNK)], workers)
    assert threading.active_count() == before


def test_a_server_that_says_nothing_does_not_hold_a_cancelled_load() -> None:
    client, cancel, never = MemoryClient({"a": CONTENT}), threading.Event(), threading.Event()

    def trouble(name: str, start: int, stop: int) -> None:
        if stop - start > 1:
            cancel.set()
            client._lock.release()  # others go on
            never.wait(30)
            client._lock.acquire()

    client.trouble = trouble
    source = RemoteSource(Requests(client), lambda total: Sizes(1, 256 << 10, 3))
    reader = PieceReader(source, [Shard("a", len(CONTENT))], chunk_bytes=CHUNK, cancel=cancel)
    with pytest.raises(LoadCancelledError):
        reader.run([Piece(0, [(0, CHUNK)], lambda _: None)])
    never.set()


def test_trouble_on_the_way_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "FIRST_PAUSE", 0.0)
    client, chance, found = MemoryClient({"a": CONTENT}), random.Random(11), bytearray(len(CONTENT))
    client.trouble = lambda name, start, stop: (
        (chance.randrange(stop - start), PassingError("connection", "reset")) if chance.random() < 0.3 else None
    )

    def keep(at: int) -> Callable[[Workspace], None]:
        def deliver(workspace: Workspace) -> None:
            found[at : at + CHUNK] = bytes(workspace.buffer.numpy())

        return deliver

    run(client, [Piece(0, [(at, CHUNK)], keep(at)) for at in range(0, len(CONTENT), CHUNK)])
    assert found == CONTENT


def test_headers_are_fetched_whole_and_once() -> None:
    shard = shard_bytes({f"tensor{number}": b"x" for number in range(2000)})
    client = MemoryClient({"a.safetensors": shard})
    source = RemoteSource(Requests(client), lambda total: Sizes(2, 1 << 20, 3))
    source.look_ahead(["a.safetensors", "gone.safetensors"])
    length = 8 + int.from_bytes(shard[:8], "little")
    assert client.asked == [("a.safetensors", 0, 65536), ("a.safetensors", 65536, length)]
    buffer = bytearray(length)
    assert source.size("a.safetensors") == len(shard)
    source.read_into("a.safetensors", 0, memoryview(buffer))
    assert buffer == shard[:length]
    assert len(client.asked) == 2
    with pytest.raises(MissingShardError):
        source.size("gone.safetensors")


@pytest.mark.parametrize(
    ("options", "total", "expected"),
    [
        ({}, 1 << 40, Sizes(8, 8 << 20, 10)),
        ({"connections": 32}, 1 << 40, Sizes(32, 8 << 20, 34)),
        ({"connections": 1}, 1 << 40, Sizes(1, 8 << 20, 3)),
        ({}, 5 << 20, Sizes(3, 5 << 20, 3)),
    ],
)
def test_sizes(options: dict[str, int], total: int, expected: Sizes) -> None:
    assert choose_sizes(LoadOptions.from_mapping(options), total) == expected


@pytest.mark.parametrize("staging", [4 << 20, 16 << 20, 64 << 20, 1 << 30])
def test_half_of_a_limit_on_staging_is_for_what_is_fetched_ahead(staging: int) -> None:
    sizes = choose_sizes(LoadOptions(staging_bytes=staging), 1 << 40)
    assert sizes.nbytes <= staging // 2
    assert sizes.buffers >= sizes.connections + 2


def test_a_target_on_the_host_is_filled() -> None:
    target = torch.empty(2 << 20, dtype=torch.uint8)
    run(MemoryClient({"a": CONTENT}), [Piece(0, [(5, 2 << 20)], lambda _: None, target=lambda: target)])
    assert bytes(target.numpy()) == CONTENT[5 : 5 + (2 << 20)]
