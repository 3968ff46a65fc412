from __future__ import annotations

import json
import re
import struct
import time

import pytest
import torch
from quantload.checkpoint import read_header
from quantload.checkpoint.headers import DTYPES, MAX_HEADER_BYTES, ShardHeader
from quantload.errors import CorruptHeaderError, QuantloadError, TruncatedShardError, UnsupportedCheckpointError
from safetensors.torch import save
from shard_files import MemorySource, entry, raw_shard, shard_bytes


def header_of(content: bytes) -> ShardHeader:
    return read_header(MemorySource({"a.safetensors": content}), "a.safetensors", 3)


def as_header(value: object, data: bytes = b"") -> bytes:
    return raw_shard(json.dumps(value).encode(), data)


def test_agrees_with_the_reference_writer_for_every_dtype() -> None:
    tensors = {
        f"layer.{name}": torch.zeros(6, 4 * dtype.itemsize, dtype=torch.uint8).view(dtype)
        for name, dtype in DTYPES.items()
    }
    header = header_of(save(tensors, {"format": "pt"}))
    assert header.metadata == {"format": "pt"}
    assert {name: (e.dtype, e.shape) for name, e in header.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert sum(e.nbytes for e in header.tensors.values()) == header.size - header.data_start
    assert all(e.shard == 3 for e in header.tensors.values())


def test_offsets_point_at_the_data() -> None:
    content = shard_bytes({"a": b"xyz", "é\n": b"hello"})
    header = header_of(content)
    found = {name: content[e.offset : e.offset + e.nbytes] for name, e in header.tensors.items()}
    assert found == {"a": b"xyz", "é\n": b"hello"}


def test_accepts_any_order_of_fields_and_white_space() -> None:
    header = b"""{ "__metadata__" : {} ,
      "b" : { "data_offsets" : [ 2 , 4 ] , "dtype" : "U8" , "shape" : [ 1 , 2 ] } ,
      "\\u0061" : {"shape":[],"data_offsets":[0,2],"dtype":"F16"}}   """
    assert header_of(raw_shard(header, b"1234")).tensors.keys() == {"a", "b"}


def test_accepts_no_tensors_and_empty_tensors() -> None:
    assert header_of(raw_shard(b"{}")).tensors == {}
    assert header_of(raw_shard(b'{"__metadata__":null}')).tensors == {}
    empty = {"a": entry("F32", [0, 5], 0, 0), "b": entry("U8", [1], 0, 1), "c": entry("F32", [0], 1, 1)}
    assert header_of(as_header(empty, b"x")).tensors["c"].nbytes == 0


good = entry("U8", [2], 0, 2)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([], "'{'"),
        (5, "'{'"),
        ({"a": {**good, "dtype": "F7"}}, "dtype 'F7'; the format has F64"),
        ({"a": {**good, "shape": [-2]}}, "non-negative integers"),
        ({"a": {**good, "shape": [2.0]}}, "non-negative integers"),
        ({"a": {**good, "shape": "2"}}, "non-negative integers"),
        ({"a": {**good, "shape": [1] * 65}}, "non-negative integers"),
        ({"a": {**good, "data_offsets": [-2, 0]}}, "non-negative integers"),
        ({"a": {**good, "data_offsets": [0, 2, 4]}}, "exactly"),
        ({"a": {**good, "data_offsets": [2, 0]}}, "takes 2 bytes"),
        ({"a": {**good, "data_offsets": [0, 10**30]}}, "exactly"),
        ({"a": {"dtype": "U8", "shape": [2]}}, "exactly"),
        ({"a": {**good, "more": 1}}, "exactly"),
        ({"a": None}, "exactly"),
        ({"a": {**good, "shape": [3]}}, "takes 3 bytes"),
        ({"a": {**good, "dtype": "F16"}}, "takes 4 bytes"),
        ({"a": {**good, "shape": [2**32, 2**32]}}, "larger than 2"),
        ({"a": {**good, "shape": [0, 2**63], "data_offsets": [0, 0]}}, "larger than 2"),
        ({"a": entry("F4", [2, 3], 0, 3)}, "must be even"),
        ({"a": good, "b": entry("U8", [2], 1, 3)}, "overlaps tensor 'a'"),
        ({"a": good, "b": entry("U8", [2], 0, 2)}, "overlaps tensor"),
        ({"a": good, "b": entry("U8", [2], 3, 5)}, "hole of 1 bytes after tensor 'a'"),
        ({"a": entry("U8", [2], 1, 3)}, "hole of 1 bytes after the header"),
        ({"a": entry("U8", [1], 0, 1)}, "3 bytes belong to none"),
        ({"__metadata__": {"a": 1}}, "both in double quotes"),
        ({"__metadata__": good}, "for '__metadata__' exactly"),
        ({"__metadata__": []}, "a JSON object"),
    ],
)
def test_names_the_broken_rule(header: object, says: str) -> None:
    with pytest.raises(CorruptHeaderError, match=re.escape(says)) as caught:
        header_of(as_header(header, b"1234"))
    assert "a.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"", "'{'"),
        (b"{", "a name in double quotes"),
        (b' {"a":{}}', "'{'"),
        (b'{"a"}', "a name in double quotes and a colon"),
        (b"{}{}", "nothing more"),
        (b'{"__metadata__":{},"__metadata__":{}}', "exactly"),
        (b'{"__metadata__":{"a":"1","a":"2"}}', "'a' appears twice"),
        (b'{"__metadata__":{"a":"\\ud800"}}', "valid UTF-8"),
        (b'{"\xff":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "valid UTF-8"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],}}', "exactly"),
        (b'{"a":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}', "exactly"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[0]}}', "exactly"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},}', "a name in double quotes"),
        (
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\\u0061":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
            "'a' appears twice",
        ),
    ],
)
def test_refuses_what_is_not_quite_json(header: bytes, says: str) -> None:
    with pytest.raises(CorruptHeaderError, match=re.escape(says)):
        header_of(raw_shard(header))


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (bytes(range(128, 148)), "found bytes that are no text (80 81 82 83 84 85 86 87 ...): it is damaged"),
        (b"\0\0", "found bytes that are no text (00 00): it is damaged"),
        (b"plain \xc3\xa9", "found 'plain \xe9': it is damaged, copy or download it again"),
        (b"", "found the end: it is damaged"),
    ],
)
def test_bytes_that_are_no_text_are_not_shown_as_such(header: bytes, found: str) -> None:
    with pytest.raises(CorruptHeaderError, match=re.escape(found)):
        header_of(raw_shard(header))


@pytest.mark.parametrize("length", [4097, 1 << 20])
def test_a_name_that_no_tensor_has_is_refused(length: int) -> None:
    with pytest.raises(CorruptHeaderError, match=f"'xxx.*{length:,} bytes, at most 4,096") as caught:
        header_of(as_header({"x" * length: good}, b"12"))
    assert len(str(caught.value)) < 300
    assert header_of(as_header({"x" * 4096: good}, b"12")).tensors


def test_dtypes_torch_lacks_are_unsupported_not_corrupt() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="F6_E2M3"):
        header_of(as_header({"a": entry("F6_E2M3", [4], 0, 3)}, b"123"))


def test_truncation_is_told_from_corruption() -> None:
    whole = shard_bytes({"a": bytes(100)})
    for length in (0, 5, 20, len(whole) - 1):
        with pytest.raises(TruncatedShardError, match="download it again"):
            header_of(whole[:length])
    with pytest.raises(CorruptHeaderError, match="1 bytes belong to none"):
        header_of(whole + b"!")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_huge_header_length_is_refused_before_it_is_read(length: int) -> None:
    source = MemorySource({"a.safetensors": struct.pack("<Q", length) + b"{}"})
    with pytest.raises(CorruptHeaderError, match="the format allows 100,000,000"):
        read_header(source, "a.safetensors")
    assert source.reads == [("a.safetensors", 0, 8)]


def peak_rss_mib(reset: bool = False) -> int:
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM"].split()[0]) // 1024


@pytest.mark.parametrize(
    ("start", "unit", "end"),
    [
        (b'{"a":', b"[", b""),
        (b'{"a":[', b"[],", b"[]]}"),
        (b'{"__metadata__":{"a":[', b"{},", b"{}]}}"),
        (b'{"a":{"dtype":"U8","shape":[', b"1,", b'1],"data_offsets":[0,1]}}'),
        (b'{"', b"a", b'":{}}'),
        (b"{", b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b'"b":{}}'),
    ],
    ids=["nested", "wide", "metadata", "shape", "name", "repeats"],
)
def test_100_mb_of_hostile_json_costs_little(start: bytes, unit: bytes, end: bytes) -> None:
    header = start + unit * ((MAX_HEADER_BYTES - len(start) - len(end)) // len(unit)) + end
    source = MemorySource({"a.safetensors": raw_shard(header)})
    del header
    before, begin = peak_rss_mib(reset=True), time.perf_counter()
    with pytest.raises(QuantloadError) as caught:
        read_header(source, "a.safetensors")
    assert time.perf_counter() - begin < 10
    assert peak_rss_mib() - before < 400
    assert len(str(caught.value)) < 1000


@pytest.mark.timing
def test_100_000_tensors_take_about_a_second() -> None:
    tensors = {
        f"model.layers.{i // 999}.experts.{i % 999}.up.weight": entry("U8", [1], i, i + 1) for i in range(100_000)
    }
    content = as_header(tensors, bytes(100_000))
    seconds = 9.0
    for _ in range(3):
        begin = time.thread_time()
        assert len(header_of(content).tensors) == 100_000
        seconds = min(seconds, time.thread_time() - begin)
        if seconds < 1.5:
            return
    pytest.fail(f"{seconds:.1f} s")
