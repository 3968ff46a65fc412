"""The loaders `bench/load.py` compares: quantload's schemes, transformers' on-the-fly quantizers, and yardsticks.

Nothing is imported before a loader is built, so this file can be read by an interpreter that has only some of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Family = Literal["quantload", "peer", "floor"]
Format = Literal["mxfp4", "nf4", "fp8", "int8", "bf16", "bytes"]
Load = Callable[[Path], Any]

READ_THREADS = 2
READ_BYTES = 8 << 20
EXPERT_PATTERN = r"re:.*\.mlp\.experts\.(gate_up_proj|down_proj)"


@dataclass(frozen=True)
class Loader:
    """One row of the table. `modules` must be importable, or the row says what is not installed.

    `build` does every import and returns the function that is timed. `only` names the checkpoints the loader is for,
    empty for all.
    """

    name: str
    family: Family
    format: Format
    build: Callable[[], Load]
    modules: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        """Bits of a weight's code."""
        return {"mxfp4": 4, "nf4": 4, "fp8": 8, "int8": 8, "bf16": 16, "bytes": 0}[self.format]

    def missing(self) -> list[str]:
        """Modules that this interpreter does not have."""
        return [name for name in self.modules if importlib.util.find_spec(name.split(".")[0]) is None]


def _quantload(scheme: str) -> Callable[[], Load]:
    def build() -> Load:
        package = importlib.import_module("quantload")

        def load(folder: Path) -> Any:
            return package.load_quantized(str(folder), quantization=scheme, device="cpu")

        return load

    return build


def _transformers(make_config: Callable[[], Any]) -> Callable[[], Load]:
    def build() -> Load:
        transformers = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        config = make_config()
        more = {} if config is None else {"quantization_config": config}

        def load(folder: Path) -> Any:
            return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", **more)

        return load

    return build


def _torchao(make_base: Callable[[], Any], experts: bool = False) -> Callable[[], Load]:
    def make_config() -> Any:
        transformers = importlib.import_module("transformers")
        base = make_base()
        if experts:
            quantization = importlib.import_module("torchao.quantization")
            base = quantization.FqnToConfig({EXPERT_PATTERN: base, "_default": base})
        return transformers.TorchAoConfig(base)

    return _transformers(make_config)


def _torchao_int8() -> Any:
    return importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()


def _torchao_float8() -> Any:
    return importlib.import_module("torchao.quantization").Float8WeightOnlyConfig()


def _torchao_mxfp4() -> Any:
    torch = importlib.import_module("torch")
    workflow = importlib.import_module("torchao.prototype.mx_formats.inference_workflow")
    fp4 = torch.float4_e2m1fn_x2
    return workflow.MXDynamicActivationMXWeightConfig(activation_dtype=fp4, weight_dtype=fp4)


def _quanto(weights: str) -> Callable[[], Load]:
    def make_config() -> Any:
        importlib.import_module("optimum.quanto")
        return importlib.import_module("transformers").QuantoConfig(weights=weights)

    return _transformers(make_config)


def _bitsandbytes(**settings: Any) -> Callable[[], Load]:
    def make_config() -> Any:
        importlib.import_module("bitsandbytes")
        return importlib.import_module("transformers").BitsAndBytesConfig(**settings)

    return _transformers(make_config)


def _floor(drop: bool) -> Callable[[], Load]:
    """Reads every byte of the files into one reused buffer a thread, and does nothing with it.

    With `drop` every piece leaves the page cache when it was read: filling it has a price too, and a load from cold
    files does not fill it.
    """

    def build() -> Load:
        return functools.partial(_read_all, drop)

    return build


def _read_all(drop: bool, folder: Path) -> None:
    pieces = [
        (path, offset)
        for path in sorted(folder.glob("*.safetensors"))
        for offset in range(0, path.stat().st_size, READ_BYTES)
    ]
    remaining = iter(pieces)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def read() -> None:
        buffer = bytearray(READ_BYTES)
        files: dict[Path, int] = {}
        try:
            while True:
                with lock:
                    piece = next(remaining, None)
                if piece is None:
                    return
                path, offset = piece
                if path not in files:
                    files[path] = os.open(path, os.O_RDONLY)
                os.preadv(files[path], [buffer], offset)
                if drop:
                    os.posix_fadvise(files[path], offset, READ_BYTES, os.POSIX_FADV_DONTNEED)
        except BaseException as error:
            failures.append(error)
        finally:
            for descriptor in files.values():
                os.close(descriptor)

    threads = [threading.Thread(target=read) for _ in range(READ_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


_AO = ("transformers", "torchao")
_QUANTO = ("transformers", "optimum.quanto", "accelerate")
_BNB = ("transformers", "bitsandbytes", "accelerate")
_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}

LOADERS: dict[str, Loader] = {
    loader.name: loader
    for loader in (
        Loader("read-only", "floor", "bytes", _floor(drop=False)),
        Loader("read-drop", "floor", "bytes", _floor(drop=True)),
        Loader("quark_mxfp4", "quantload", "mxfp4", _quantload("quark_mxfp4"), ("quantload",)),
        Loader("fp8_per_channel", "quantload", "fp8", _quantload("fp8_per_channel"), ("quantload",)),
        Loader("fp8_per_block", "quantload", "fp8", _quantload("fp8_per_block"), ("quantload",)),
        Loader("fp8_per_tensor", "quantload", "fp8", _quantload("fp8_per_tensor"), ("quantload",)),
        Loader("int8_per_channel", "quantload", "int8", _quantload("int8_per_channel"), ("quantload",)),
        Loader("none", "quantload", "bf16", _quantload("none"), ("quantload",)),
        Loader("transformers-bf16", "peer", "bf16", _transformers(lambda: None), ("transformers",)),
        Loader("torchao-int8", "peer", "int8", _torchao(_torchao_int8), _AO),
        Loader("torchao-float8", "peer", "fp8", _torchao(_torchao_float8), _AO),
        Loader("torchao-mxfp4", "peer", "mxfp4", _torchao(_torchao_mxfp4), _AO),
        Loader("torchao-int8-experts", "peer", "int8", _torchao(_torchao_int8, True), _AO, ("moe",)),
        Loader("torchao-float8-experts", "peer", "fp8", _torchao(_torchao_float8, True), _AO, ("moe",)),
        Loader("torchao-mxfp4-experts", "peer", "mxfp4", _torchao(_torchao_mxfp4, True), _AO, ("moe",)),
        Loader("quanto-int8", "peer", "int8", _quanto("int8"), _QUANTO),
        Loader("quanto-float8", "peer", "fp8", _quanto("float8"), _QUANTO),
        Loader("bitsandbytes-int8", "peer", "int8", _bitsandbytes(load_in_8bit=True), _BNB),
        Loader("bitsandbytes-nf4", "peer", "nf4", _bitsandbytes(**_NF4), _BNB),
    )
}
