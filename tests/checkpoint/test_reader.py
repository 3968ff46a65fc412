from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantload.checkpoint import Barrier, FileSource, Piece, PieceReader, Shard, Workspace, read_index
from quantload.checkpoint.pieces import Lines
from quantload.checkpoint.reader import move_together
from quantload.checkpoint.resolve import resolve
from quantload.errors import LoadCancelledError, PolicyError, TruncatedShardError
from shard_files import MemorySource, write_sharded
from torch import Tensor

KIB = 1 << 10


def memory_shards(*contents: bytes) -> tuple[MemorySource, list[Shard]]:
    files = {f"{number}.safetensors": content for number, content in enumerate(contents)}
    return MemorySource(files), [Shard(name, len(content)) for name, content in files.items()]


def nothing(workspace: Workspace) -> None:
    pass


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("quantload-reader")]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    process = psutil.Process()
    files = process.num_fds()
    yield
    assert alive() == []
    assert process.num_fds() == files


@given(
    start=st.integers(0, 40),
    length=st.integers(1, 300),
    gap=st.integers(0, 300),
    count=st.integers(1, 200),
    step=st.sampled_from([1, 500, 1 << 20]),
    target=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_lines_come_end_to_end_with_what_lies_between_them_read_and_dropped(
    start: int, length: int, gap: int, count: int, step: int, target: bool
) -> None:
    pitch = length + gap
    content = random.Random(count).randbytes(start + count * pitch)
    source, shards = memory_shards(content)
    source.read_bytes = step
    lines = Lines(start, pitch, length, count)
    storage, got = torch.zeros(lines.lines * length, dtype=torch.uint8), []
    piece = Piece(
        0, lines, lambda w: got.append(bytes(w.buffer.tolist())), target=(lambda: storage) if target else None
    )
    totals = PieceReader(source, shards, chunk_bytes=count * length).run([piece])
    assert got == [b"".join(content[at : at + length] for at, _ in lines)]
    assert totals.bytes_read == count * length


@pytest.mark.parametrize(("length", "pitch"), [(1, 2), (1000, 1001), (1000, 2500), (1000, 9000)])
def test_lines_are_moved_together_without_a_copy_of_all_of_them(length: int, pitch: int) -> None:
    count = (1 << 20) // pitch
    content = np.random.default_rng(0).integers(0, 256, count * pitch, np.uint8)
    expected = content.reshape(count, pitch)[:, :length].tobytes()
    tracemalloc.start()
    try:
        move_together(content, count, length, pitch)
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()
    assert content[: count * length].tobytes() == expected


def test_inside_of_with_buffers_and_files_stay_from_run_to_run() -> None:
    source, shards = memory_shards(bytes(range(256)) * 64)
    got: list[int] = []

    def note(workspace: Workspace) -> None:
        got.append(workspace.buffer.data_ptr())

    def fail(workspace: Workspace) -> None:
        raise ValueError("no")

    reader = PieceReader(source, shards, chunk_bytes=4096)
    with reader:
        totals = [reader.run([Piece(0, ((at, 100),), note)]) for at in (0, 5000)]
        with pytest.raises(ValueError, match="no"):
            reader.run([Piece(0, ((0, 100),), fail)])
        reader.run([Piece(0, ((0, 100),), note)])
        assert source.closed == 0
    assert source.closed == 1
    assert len(set(got)) == 1
    assert [each.bytes_read for each in totals] == [100, 100]
    reader.run([Piece(0, ((0, 100),), note)])
    assert source.closed == 2


def test_lines_close_to_each_other_are_read_together() -> None:
    source, shards = memory_shards(random.Random(0).randbytes(1 << 20))
    PieceReader(source, shards, chunk_bytes=1 << 18).run([Piece(0, Lines(0, 256, 64, 4096), nothing)])
    assert len(source.reads) < 50
    far, shards = memory_shards(bytes(1 << 20))
    PieceReader(far, shards, chunk_bytes=4096).run([Piece(0, Lines(0, 1 << 16, 64, 16), nothing)])
    assert far.reads == [("0.safetensors", at << 16, 64) for at in range(16)]


Layout = tuple[list[int], int, list[tuple[int, list[tuple[int, int]], bool]]]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Shard sizes, a chunk size, and pieces that cover every byte of every shard once, in any order."""
    chunk = draw(st.sampled_from([4096, 8192, 12_288]))
    sizes = draw(st.lists(st.integers(0, 60_000), min_size=1, max_size=3))
    pieces: list[tuple[int, list[tuple[int, int]], bool]] = []
    for shard, size in enumerate(sizes):
        cuts = draw(st.lists(st.integers(0, size), max_size=30))
        edges = sorted({0, size, *range(0, size, chunk), *cuts})
        ranges = [(start, stop - start) for start, stop in itertools.pairwise(edges)]
        while ranges:
            count = draw(st.integers(1, 3))
            extents, ranges = ranges[:count], ranges[count:]
            target = draw(st.booleans())
            while not target and sum(length for _, length in extents) > chunk:
                ranges.insert(0, extents.pop())
            pieces.append((shard, extents, target))
    if draw(st.booleans()):
        pieces = draw(st.permutations(pieces))
    return sizes, chunk, pieces


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), workers=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_every_byte_is_delivered_exactly_once(layout: Layout, workers: int, seed: int) -> None:
    sizes, chunk, plan = layout
    contents = [random.Random(seed + number).randbytes(size) for number, size in enumerate(sizes)]
    source, shards = memory_shards(*contents)
    arrived = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    count = [torch.zeros(size, dtype=torch.uint8) for size in sizes]

    def make(shard: int, extents: list[tuple[int, int]], with_target: bool) -> Piece:
        nbytes = sum(length for _, length in extents)
        storage = torch.zeros(nbytes, dtype=torch.uint8) if with_target else None

        def deliver(workspace: Workspace) -> None:
            buffer = workspace.buffer
            assert buffer.numel() == nbytes
            assert storage is not None or buffer.data_ptr() % 16 == 0
            assert storage is None or buffer is storage
            position = 0
            for offset, length in extents:
                arrived[shard][offset : offset + length] = buffer[position : position + length]
                count[shard][offset : offset + length] += 1
                position += length
            if storage is None:
                buffer.fill_(255)

        return Piece(shard, tuple(extents), deliver, None if storage is None else lambda: storage)

    reader = PieceReader(source, shards, workers=workers, chunk_bytes=chunk)
    totals = reader.run([make(*spec) for spec in plan])
    assert [bytes(data.numpy()) for data in arrived] == contents
    assert all(counts.eq(1).all() for counts in count)
    assert totals.bytes_read == sum(sizes)
    assert totals.staging_peak_bytes <= workers * 2 * chunk
    assert source.closed == 1


def test_real_files(tmp_path: Path) -> None:
    generator = random.Random(1)
    tensors = {f"t{i}": generator.randbytes(generator.choice([3, 500, 70_000])) for i in range(60)}
    names = list(tensors)
    half = {name: tensors[name] for name in names[:30]}, {name: tensors[name] for name in names[30:]}
    write_sharded(tmp_path, {"a.safetensors": half[0], "b.safetensors": half[1]})
    checkpoint = resolve(tmp_path)
    index = read_index(checkpoint)
    found: dict[str, bytes] = {}

    def piece(name: str) -> Piece:
        entry = index.tensors[name]

        def deliver(workspace: Workspace) -> None:
            found[name] = bytes(workspace.buffer.numpy())

        return Piece(entry.shard, ((entry.offset, entry.nbytes),), deliver)

    source = FileSource(checkpoint.root)
    PieceReader(source, index.shards, workers=2, chunk_bytes=1 << 17).run([piece(name) for name in names])
    assert found == tensors


def test_small_pieces_share_reads_and_large_ones_are_cut() -> None:
    source, shards = memory_shards(bytes(4 << 20))
    small = [Piece(0, ((100 * i, 100),), nothing) for i in range(1000)]
    large = [Piece(0, ((1 << 20, 3 << 20),), nothing)]
    PieceReader(source, shards, chunk_bytes=3 << 20).run(small + large)
    assert source.reads == [("0.safetensors", 0, 100_000)] + [("0.safetensors", n << 20, 1 << 20) for n in (1, 2, 3)]


def test_asks_ahead_and_releases_behind() -> None:
    source, shards = memory_shards(bytes(100 * KIB))
    barrier = Barrier(1)
    pieces = [Piece(0, ((n * 10 * KIB, 10 * KIB),), nothing) for n in range(8)]
    strided = Piece(0, ((90 * KIB, 1), (95 * KIB, 1)), nothing)
    first_pass = Piece(0, ((91 * KIB, 1),), nothing, signal=barrier)
    PieceReader(source, shards, chunk_bytes=12 * KIB).run([*pieces, strided, first_pass])
    expected = [(n * 10 * KIB, 10 * KIB) for n in range(8)]
    assert [(offset, length) for _, offset, length in source.released] == expected
    assert [offset for _, offset, _ in source.prefetched][:7] == [offset for offset, _ in expected[1:]]


def test_what_stays_cached_for_a_second_read() -> None:
    source, shards = memory_shards(bytes(100))
    barrier = Barrier(2)
    first = [Piece(0, ((50 * n, 50),), nothing, signal=barrier) for n in range(2)]
    second = [Piece(0, ((50 * n, 50),), nothing, after=barrier) for n in range(2)]
    PieceReader(source, shards, chunk_bytes=4096).run([*first, *second])
    assert source.reads == [("0.safetensors", 0, 100)] * 2
    assert source.released == [("0.safetensors", 0, 100)]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_barriers_hold_the_second_pass_back(workers: int) -> None:
    source, shards = memory_shards(bytes(range(200)) * 1000)
    generator = random.Random(workers)
    log: list[tuple[int, str]] = []
    pieces: list[Piece] = []

    def note(tensor: int, stage: str) -> Callable[[Workspace], None]:
        def deliver(workspace: Workspace) -> None:
            time.sleep(generator.random() * 0.002)
            log.append((tensor, stage))

        return deliver

    for tensor in range(12):
        barrier = Barrier(5)
        extents = [((tensor * 5000 + n * 1000, 1000),) for n in range(5)]
        pieces += [Piece(0, extent, note(tensor, "max"), signal=barrier) for extent in extents]
        pieces += [Piece(0, extent, note(tensor, "quantize"), after=barrier) for extent in extents]
    PieceReader(source, shards, workers=workers, chunk_bytes=4096).run(pieces)
    assert len(log) == 120
    for tensor in range(12):
        stages = [stage for number, stage in log if number == tensor]
        assert stages == ["max"] * 5 + ["quantize"] * 5


def test_a_barrier_that_cannot_open_is_refused_before_reading() -> None:
    source, shards = memory_shards(bytes(10))
    with pytest.raises(ValueError, match="waits for 1 signals"):
        PieceReader(source, shards).run([Piece(0, ((0, 1),), nothing, after=Barrier(1))])
    assert source.reads == []


def test_scratch_and_buffer_of_one_worker_are_reused() -> None:
    source, shards = memory_shards(bytes(range(100)) * 1000)
    places: set[tuple[int, int]] = set()

    def deliver(workspace: Workspace) -> None:
        workspace.scratch(4096).fill_(7)
        places.add((workspace.buffer.data_ptr(), workspace.scratch(8).data_ptr()))

    pieces = [Piece(0, ((4096 * n, 4096),), deliver) for n in range(20)]
    totals = PieceReader(source, shards, chunk_bytes=4096).run(pieces)
    assert len(places) == 1
    assert totals.staging_peak_bytes == 8192


def test_targets_are_made_just_before_their_read_and_never_staged() -> None:
    source, shards = memory_shards(bytes(1 << 20))
    events: list[str] = []

    def piece(number: int) -> Piece:
        def target() -> Tensor:
            events.append(f"target {number}")
            return torch.empty(100_000, dtype=torch.uint8)

        return Piece(0, ((number * 100_000, 100_000),), lambda workspace: events.append(f"deliver {number}"), target)

    totals = PieceReader(source, shards, chunk_bytes=4096).run([piece(n) for n in range(3)])
    assert events == [f"{what} {n}" for n in range(3) for what in ("target", "deliver")]
    assert totals.staging_peak_bytes == 0


@pytest.mark.parametrize(
    "wrong", [torch.empty(9, dtype=torch.uint8), torch.empty(10), torch.empty(2, 5, dtype=torch.uint8)]
)
def test_wrong_targets(wrong: Tensor) -> None:
    source, shards = memory_shards(bytes(10))
    with pytest.raises(ValueError, match="1-D uint8 tensor of the piece's 10 bytes"):
        PieceReader(source, shards).run([Piece(0, ((0, 10),), nothing, lambda: wrong)])


def test_staging_limits_the_workers() -> None:
    source, shards = memory_shards(b"")
    with pytest.raises(PolicyError, match="staging_bytes is 8191; pieces of 4096 bytes need at least 8192"):
        PieceReader(source, shards, chunk_bytes=4096, staging_bytes=8191)
    assert PieceReader(source, shards, workers=4, chunk_bytes=4096, staging_bytes=3 * 8192).workers == 3
    assert PieceReader(source, shards, workers=4, chunk_bytes=4096).workers == 4


def test_pieces_that_do_not_fit() -> None:
    source, shards = memory_shards(bytes(10_000))
    with pytest.raises(ValueError, match="piece 0 has 4097 bytes, chunk_bytes is 4096"):
        PieceReader(source, shards, chunk_bytes=4096).run([Piece(0, ((0, 4097),), nothing)])
    with pytest.raises(ValueError, match="of shard 1, there are 1"):
        PieceReader(source, shards).run([Piece(1, ((0, 1),), nothing)])


def test_nothing_to_read() -> None:
    source, shards = memory_shards(b"")
    assert PieceReader(source, shards).run([]).bytes_read == 0


def test_progress_ends_with_the_total() -> None:
    class Slow(MemorySource):
        def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
            time.sleep(0.05)
            return super().read_into(path, offset, buffer)

    source = Slow({"a": bytes(5000)})
    seen: list[int] = []
    pieces = [Piece(0, ((n * 1000, 1000),), nothing, lambda: torch.empty(1000, dtype=torch.uint8)) for n in range(5)]
    pieces = [p for n in range(5) for p in (pieces[n], Piece(0, (), nothing))]
    PieceReader(source, [Shard("a", 5000)], on_progress=seen.append).run(pieces)
    assert seen == sorted(seen)
    assert seen[-1] == 5000
    assert len(seen) > 1


def one_mib_pieces(shards: list[Shard], deliver: Callable[[Workspace], None]) -> list[Piece]:
    return [Piece(0, ((n << 20, 1 << 20),), deliver) for n in range(shards[0].size >> 20)]


@pytest.fixture
def shard(tmp_path: Path) -> tuple[FileSource, list[Shard]]:
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(64 << 20))
    return FileSource(tmp_path, retries=0), [Shard("a.safetensors", 64 << 20)]


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_an_error_in_deliver_ends_everything(shard: tuple[FileSource, list[Shard]]) -> None:
    source, shards = shard
    delivered: list[int] = []

    def deliver(workspace: Workspace) -> None:
        delivered.append(1)
        if len(delivered) == 4:
            raise RuntimeError("cannot quantize this")

    before, open_before = anonymous_bytes(), psutil.Process().open_files()
    with pytest.raises(RuntimeError, match="cannot quantize this") as caught:
        PieceReader(source, shards, workers=3, chunk_bytes=8 << 20).run(
            [Piece(0, ((n << 23, 8 << 20),), deliver) for n in range(8)]
        )
    assert caught.traceback[-1].name == "deliver"
    assert len(delivered) < 8
    assert alive() == []
    assert len(psutil.Process().open_files()) == len(open_before)
    assert anonymous_bytes() - before < 8 << 20, "although the traceback is still there"


def test_a_file_truncated_while_it_is_read(shard: tuple[FileSource, list[Shard]], tmp_path: Path) -> None:
    source, shards = shard

    def deliver(workspace: Workspace) -> None:
        os.truncate(tmp_path / "a.safetensors", 10 << 20)

    with pytest.raises(TruncatedShardError, match="ended at byte 10,485,760"):
        PieceReader(source, shards, workers=2).run(one_mib_pieces(shards, deliver))


class Crawling(MemorySource):
    """Each read takes 0.1 s."""

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        time.sleep(0.1)
        return super().read_into(path, offset, buffer)


def crawl() -> tuple[Crawling, list[Shard], list[Piece]]:
    source = Crawling({"a": bytes(64 << 20)})
    barrier = Barrier(1)
    waiting = [Piece(0, ((0, 1),), nothing, after=barrier) for _ in range(2)]
    return source, [Shard("a", 64 << 20)], [Piece(0, ((0, 64 << 20),), nothing, signal=barrier), *waiting]


@pytest.mark.timing
def test_cancel_takes_less_than_a_second_even_in_a_slow_read() -> None:
    source, shards, pieces = crawl()
    cancel = threading.Event()
    started = time.monotonic()
    threading.Timer(0.2, cancel.set).start()
    with pytest.raises(LoadCancelledError):
        PieceReader(source, shards, workers=3, chunk_bytes=64 << 20, cancel=cancel).run(pieces)
    assert time.monotonic() - started < 1


@pytest.mark.timing
def test_ctrl_c_takes_less_than_a_second_even_in_a_slow_read() -> None:
    source, shards, pieces = crawl()
    started = time.monotonic()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        PieceReader(source, shards, workers=3, chunk_bytes=64 << 20).run(pieces)
    assert time.monotonic() - started < 1
    timer.join()
    assert source.closed == 1


def test_a_source_that_fails_wakes_those_who_wait_for_its_piece() -> None:
    class Failing(MemorySource):
        def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
            if offset == 0:
                time.sleep(0.1)
                raise OSError("gone")
            return super().read_into(path, offset, buffer)

    barrier = Barrier(1)
    pieces = [Piece(0, ((0, 5000),), nothing, signal=barrier), Piece(0, ((9000, 5000),), nothing, after=barrier)]
    with pytest.raises(OSError, match="gone"):
        PieceReader(Failing({"a": bytes(20_000)}), [Shard("a", 20_000)], workers=2, chunk_bytes=8192).run(pieces)


@pytest.mark.timing
def test_small_pieces_cost_little() -> None:
    source, shards = memory_shards(bytes(1 << 20))
    pieces = [Piece(0, ((40 * n, 40),), nothing) for n in range(20_000)]
    best = 9.0
    for _ in range(3):
        begin = time.process_time()
        PieceReader(source, shards, workers=2).run(pieces)
        best = min(best, (time.process_time() - begin) / len(pieces))
    assert best < 40e-6
