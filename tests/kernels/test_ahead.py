"""Kernels are compiled in a process of its own where numba's disk cache does not have them, else here, said aloud."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import psutil
import pytest
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.registry import cpu_target
from quantload.checkpoint.device import Event
from quantload.kernels.cpu import ahead, compiled
from quantload.kernels.cpu.build import integer as integer_build
from quantload.kernels.cpu.build import linear as linear_build
from quantload.kernels.cpu.build import mx as mx_build
from quantload.kernels.cpu.build import nl4 as nl4_build
from quantload.kernels.cpu.build import nvfp4 as nvfp4_build
from quantload.kernels.cpu.build import scaled as cpu_build
from quantload.kernels.cpu.compile_lock import CompileLock
from quantload.kernels.cpu.compiled import Compiled, KernelFunction, Needed, Recipe, jit

_numbers = itertools.count()


def _add(number: int) -> Recipe[KernelFunction]:
    def add(x: int) -> int:
        return x + number

    return jit(add, types.int64(types.int64))


add = Compiled(_add)


@pytest.fixture
def needed() -> Needed[KernelFunction]:
    """A function that no test has asked for."""
    return add.needed(next(_numbers))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("quantload"), "handlers", [])  # those of tests of the command line
    caplog.set_level(logging.INFO, "quantload")


@pytest.fixture
def compiled_here() -> Iterator[list[str]]:
    """The names of the functions that are compiled in this process."""
    names: list[str] = []

    class Listener(numba.core.event.Listener):  # type: ignore[misc]
        def on_start(self, event: Event) -> None:
            names.append(event.data["dispatcher"].py_func.__name__)

        def on_end(self, event: Event) -> None:
            pass

    with numba.core.event.install_listener("numba:compile", Listener()):
        yield names


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def _no_child_stays() -> Iterator[None]:
    before = psutil.Process().children()
    yield
    assert psutil.Process().children() == before


def test_another_process_compiles(
    needed: Needed[KernelFunction],
    compiled_here: list[str],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    ahead.prepare([needed, needed])
    assert needed.get()(2) == 2 + needed.key[0]
    assert compiled_here == []
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == ["Compiled 1 CPU kernels"]
    assert capfd.readouterr() == ("", "")
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_is_there_is_not_compiled_again(
    needed: Needed[KernelFunction], compiled_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead.prepare([needed])
    monkeypatch.setattr(ahead, "_run_child", lambda described: pytest.fail("nothing is missing"))
    ahead.prepare([needed])
    add._made.clear()  # as in another process
    ahead.prepare([needed])
    assert needed.get()(2) == 2 + needed.key[0]
    assert compiled_here == []


@pytest.mark.parametrize(
    ("executable", "said"),
    [
        ("", "sys.executable is ''"),
        ("/usr/sbin/uwsgi", "sys.executable is '/usr/sbin/uwsgi'"),
        ("/nowhere/python3", "No such file or directory"),
        ("exit 0", "did not leave them in the disk cache"),
        ("echo first >&2; echo the last line >&2; exit 3", "ended with code 3: the last line"),
        ("kill -9 $$", "ended with code -9: no message"),
        ("exec sleep 60", "timed out after 0.5 seconds"),
    ],
)
def test_else_this_process_compiles_and_says_why(
    executable: str,
    said: str,
    needed: Needed[KernelFunction],
    compiled_here: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if " " in executable:
        executable = program(tmp_path / "python3", executable)
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(ahead, "LIMIT_SECONDS", 0.5 if "timed out" in said else 60.0)
    ahead.prepare([needed])
    assert needed.get()(2) == 2 + needed.key[0]
    assert compiled_here == ["add"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "1 CPU kernels are compiled in this process" in record.getMessage()
    assert said in record.getMessage()


IMPATIENT = """
exec {python} -c "
import runpy, sys
from quantload.kernels.cpu import compile_lock
compile_lock.NOTICE_SECONDS = 0
sys.argv = ['ahead', sys.argv[-1]]
runpy.run_module('quantload.kernels.cpu.ahead', run_name='__main__')
" "$@"
"""


def test_the_process_that_compiles_says_that_it_waits(
    needed: Needed[KernelFunction],
    compiled_here: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python3", IMPATIENT.format(python=sys.executable)))
    with CompileLock(_add(*needed.key)._lock_path()) as lock:  # as another process has it
        assert lock.take()

        class Release(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                lock.release()

        monkeypatch.setattr(logging.getLogger("quantload"), "handlers", [Release()])
        ahead.prepare([needed])
    assert compiled_here == []
    waiting, compiled = caplog.records
    assert waiting.levelname == "INFO"
    assert waiting.getMessage().startswith("waiting for another process that compiles CPU kernels; ")
    assert compiled.getMessage().startswith("Compiled 1 CPU kernels in ")


def test_a_program_that_was_frozen_is_not_started_again(
    needed: Needed[KernelFunction], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    ahead.prepare([needed])
    assert needed.get()(2) == 2 + needed.key[0]
    assert "need not be a Python interpreter" in caplog.text


def test_without_a_folder_for_the_cache_this_process_compiles(
    needed: Needed[KernelFunction],
    compiled_here: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "ZipCacheLocator")
    monkeypatch.setattr(ahead, "_run_child", lambda described: pytest.fail("nobody could read what it makes"))
    monkeypatch.setattr(compiled, "_said", [])
    ahead.prepare([needed, add.needed(next(_numbers))])
    assert compiled_here == ["add", "add"]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "let XDG_CACHE_HOME or NUMBA_CACHE_DIR name a folder" in record.getMessage()


def test_a_damaged_cache_is_named(
    needed: Needed[KernelFunction],
    compiled_here: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    ahead.prepare([needed])
    (index,) = (tmp_path / "cache").rglob("*.nbi")
    index.write_bytes(b"")
    add._made.clear()
    monkeypatch.setattr(ahead, "_run_child", lambda described: pytest.fail("it would find the same damage"))
    ahead.prepare([needed])
    assert compiled_here == ["add"]
    assert "numba's disk cache is damaged" in caplog.text


def test_a_cache_that_takes_nothing_more_is_said_and_the_kernel_compiled_all_the_same(
    needed: Needed[KernelFunction],
    compiled_here: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(ahead, "_run_child", full)
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    ahead.prepare([needed])
    assert compiled_here == ["add", "add"]  # a second time, without the cache
    assert "a compiled kernel cannot be kept in" in caplog.text
    assert "File too large" in caplog.text


def test_processes_that_write_at_once_do_not_swap_their_functions(
    compiled_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both read an empty index of the cache; then one writes its index last, the other its machine code."""
    late = []
    numbers = next(_numbers), next(_numbers)
    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, "_load_index", lambda self: {})
        patch.setattr(IndexDataCacheFile, "_save_data", lambda *file: late.append(file))
        for number in numbers:
            _add(number).compile()
    for file in reversed(late):
        IndexDataCacheFile._save_data(*file)
    assert compiled_here == ["add", "add"]
    assert [_add(number).compile()(1000) for number in numbers] == [1000 + number for number in numbers]
    assert compiled_here == ["add", "add"]  # they came from the cache


def test_what_another_process_compiles_is_waited_for(compiled_here: list[str]) -> None:
    number = next(_numbers)
    with CompileLock(_add(number)._lock_path()) as lock:
        assert lock.take()
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(_add(number).compile)
            _add(number)._compile()  # as the other process does
            lock.release()
            assert waiting.result()(1000) == 1000 + number
    assert compiled_here == ["add"]


def test_processes_share_what_all_of_them_need(compiled_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What another is compiling comes last."""
    first, second = next(_numbers), next(_numbers)
    described = [(__name__, "_add", (first,)), (__name__, "_add", (second,))]
    monkeypatch.setattr(sys, "argv", ["ahead", json.dumps(described)])
    with CompileLock(_add(first)._lock_path()) as lock:
        assert lock.take()
        with ThreadPoolExecutor() as pool:
            compiling = pool.submit(ahead.main)
            while _add(second).is_missing():
                time.sleep(0.01)
            assert not compiling.done()
            assert _add(first).is_missing()
            lock.release()
            compiling.result()
    assert not _add(first).is_missing()
    assert compiled_here == ["add", "add"]


def test_every_closure_has_files_of_its_own() -> None:
    formats, kinds, flags = ("mxfp4", "mxfp6_e2m3", "mxfp8"), ("bf16", "f16", "f32"), (False, True)
    keys = list(itertools.product(formats, ("default", "mse"), kinds, flags))
    names = {mx_build._mx_quantize(*key).function.__qualname__ for key in keys}
    assert len(names) == len(keys)
    assert mx_build._mx_quantize(*keys[0]).function.__qualname__ in names  # the same in every process
    scaled = {cpu_build._scaled_quantize(rule, "bf16", True).function.__qualname__ for rule in cpu_build.TARGETS}
    assert len(scaled) == len(cpu_build.TARGETS)
    assert len({integer_build._observe(lanes, "bf16").function.__qualname__ for lanes in (16, 32)}) == 2
    assert len({linear_build._dequantize(name, "f32").function.__qualname__ for name in ("mxfp4", "fp8", "int8")}) == 3


def _cache_key(recipe: Recipe[Any]) -> Any:
    return FunctionCache(recipe.function)._index_key(recipe.signature, cpu_target.target_context.codegen())


def _pair(first: str, second: str, third: tuple[str, str]) -> Recipe[KernelFunction]:
    def length(x: int) -> int:
        return x + len(first) + len(second) + len(third)

    return jit(length, types.int64(types.int64))


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (_pair, ("same", "same", ("same", "same"))),
        *((cpu_build._scaled_quantize, (rule, "bf16", True)) for rule in cpu_build.TARGETS),
        *((mx_build._mx_quantize, (name, "mse", "f32", False)) for name in ("mxfp4", "mxfp6_e2m3", "mxfp8")),
        (nl4_build._nl4_quantize, ("bf16", True)),
        *((nvfp4_build._nvfp4_quantize, (mode, "bf16", True)) for mode in ("default", "mse")),
        *((integer_build._quantize, (8, kind, "symmetric", 32, "f32", True)) for kind in ("f16", "bf16", "f32")),
        (integer_build._quantize, (4, "f16", "searched", 32, "bf16", True)),
        *((linear_build._dequantize, (name, "f32")) for name in linear_build.DECODERS),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(map(str, value)),
)
def test_the_process_that_compiles_finds_the_same_place_in_the_cache(
    build: Callable[..., Recipe[Any]], key: tuple[Any, ...]
) -> None:
    """It is told the texts as JSON: they are equal to constants of the builder, but not the same objects."""

    def told(value: Any) -> Any:
        return tuple(map(told, value)) if isinstance(value, tuple) else json.loads(json.dumps(value))

    here, there = build(*key), build(*told(key))
    assert _cache_key(here) == _cache_key(there)
    assert here.function.__qualname__ == there.function.__qualname__


def test_what_compiles_does_without_torch() -> None:
    names = ("mx", "scaled", "nvfp4", "nl4", "integer", "rows", "linear", "panel")
    modules = (*(f"build.{name}" for name in names), "ahead")
    code = "import sys; " + "; ".join(f"import quantload.kernels.cpu.{name}" for name in modules)
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


PROCESS = """
import json, logging, sys
from quantload.kernels.cpu import ahead; from quantload.kernels.cpu.build import mx as mx_build, scaled as cpu_build
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
rules = json.loads(sys.argv[1])
ahead.prepare([cpu_build.scaled_quantize.needed(rule, "bf16", True) for rule in rules])
misses = [sum(cpu_build.scaled_quantize(rule, "bf16", True).stats.cache_misses.values()) for rule in rules]
print("compiled here:", sum(misses))
"""


@pytest.mark.slow
def test_processes_that_start_together_do_not_disturb_each_other(tmp_path: Path) -> None:
    orders = [["fp8_channel", "fp8_block", "int8"], ["int8", "fp8_block"], ["fp8_tensor"]]
    commands = [[sys.executable, "-c", PROCESS, json.dumps(order)] for order in orders]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    for child in children:
        out, _ = child.communicate(timeout=900)
        assert child.returncode == 0
        assert "for this and later processes" in out
        assert out.endswith("compiled here: 0\n")
    everything = sorted({rule for order in orders for rule in order})
    command = [sys.executable, "-c", PROCESS, json.dumps(everything)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "compiled here: 0\n"
