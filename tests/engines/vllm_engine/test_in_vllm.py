"""vLLM itself, on a CPU, with weights that quantload streams into it: run in the environment that .ci/engines makes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from quantload.engines.names import SCHEMES
from quantload.errors import MissingWeightsError, PolicyError, UnsupportedCheckpointError
from quantload.memory.planner import SLACK_BYTES
from quantload.memory.report import LoadReport
from safetensors.torch import load_file
from torch import Tensor
from vllm_reference import ARCHITECTURES, QUANTIZED, make
from vllm_running import (
    ANSWER,
    log_probabilities,
    log_probabilities_beside,
    model_of,
    picture,
    quantized_tensors,
    running,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: .ci/engines makes an environment"),
]
HERE = Path(__file__).parent
CLOSE = 0.3
"""What log probabilities may differ by: attention in BF16 is another one."""
FAR = {"deepseek_v3": 0.4}
"""What is as far from transformers in vLLM without quantization."""
OWN_NAMES = {"fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8", "experts_int8"}
"""What vLLM has methods of its own for: ours have a prefix."""


DECODED = ("awq", "fp8", "mxfp4")
"""Those of the checkpoints that tools have quantized with which an engine is run."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All checkpoints, and what `load_quantized` makes of them."""
    found = tmp_path_factory.mktemp("checkpoints")
    asked = [f"demo={scheme}" for scheme in SCHEMES]
    asked += [
        "demo=none",
        "demo=quark_mxfp4+lora",
        "demo-b=",
        "large=",
        "idefics3=quark_mxfp4",
        *(f"{name}={scheme}" for name in DECODED for scheme in ("int8_per_channel", "auto")),
        *(f"{name}=quark_mxfp4" for name in ARCHITECTURES if name != "large"),
    ]
    subprocess.run([sys.executable, HERE / "vllm_reference.py", found, *asked], check=True, timeout=800)
    return found


@pytest.fixture
def _registered() -> None:
    from quantload.engines.vllm import register

    register()  # vLLM does when it parses arguments


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "report.json"
    monkeypatch.setenv("QUANTLOAD_REPORT", str(path))
    return path


def expected(folder: Path, name: str, scheme: str = "quark_mxfp4") -> list[float]:
    return json.loads((folder / f"{name}.{scheme}.json").read_text())  # type: ignore[no-any-return]


def difference(one: list[float], other: list[float], passed_over: int = 0) -> float:
    """The largest one, but for so many."""
    return sorted(abs(a - b) for a, b in zip(one, other, strict=True))[-1 - passed_over]


def in_other_processes(checkpoint: Path, scheme: str = "quark_mxfp4", **options: Any) -> list[float]:
    """What an engine with several ranks makes of a checkpoint."""
    command = [sys.executable, str(HERE / "vllm_running.py"), str(checkpoint), scheme, json.dumps(options)]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    (answer,) = (line.removeprefix(ANSWER) for line in run.stdout.splitlines() if line.startswith(ANSWER))
    return json.loads(answer)  # type: ignore[no-any-return]


def test_a_model_that_sees_keeps_what_it_sees_with(folder: Path, report: Path) -> None:
    options = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1}}
    with running(folder / "idefics3", "quark_mxfp4", **options) as engine:
        found = log_probabilities_beside(engine, picture())
        other = log_probabilities_beside(engine, picture().rotate(90))
    assert difference(found, expected(folder, "idefics3")) < CLOSE
    assert found != other
    told = LoadReport.load(report)
    kept = {each.name for each in told.kept if each.reason == "of a tower or projector for images or sound"}
    assert len(kept) == 9  # of two layers, and what projects
    assert len(told.layers) == 8
    assert not any("vision_model" in layer.name or "connector" in layer.name for layer in told.layers)


@pytest.mark.parametrize("method", DECODED)
def test_a_checkpoint_that_is_quantized_is_quantized_anew(method: str, folder: Path, report: Path) -> None:
    with running(folder / method / "model", "int8_per_channel") as engine:
        assert difference(log_probabilities(engine), expected(folder, method, "int8_per_channel"), 3) < CLOSE
    found = LoadReport.load(report)
    assert {layer.scheme for layer in found.layers} == {"int8_per_channel"}
    assert found.fallback_conversions == 0  # nothing was decoded whole


@pytest.mark.parametrize("method", DECODED)
def test_a_checkpoint_that_is_quantized_stays_as_it_is_stored(method: str, folder: Path, report: Path) -> None:
    with running(folder / method / "model", "quantload_auto") as engine:
        first = log_probabilities(engine)
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / method / "model")})
        assert log_probabilities(engine) == first
    assert difference(first, expected(folder, method, "auto"), 3) < CLOSE
    found = LoadReport.load(report)
    assert {layer.scheme for layer in found.layers} == {"prequantized"}
    assert found.fallback_conversions == 0


def test_two_ranks_have_slices_of_what_is_stored(folder: Path) -> None:
    found = in_other_processes(folder / "awq" / "model", "quantload_auto", tensor_parallel_size=2)
    assert difference(found, expected(folder, "awq", "auto"), 3) < CLOSE


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("method", sorted(QUANTIZED))
def test_who_reads_a_checkpoint_that_is_quantized(method: str, tmp_path: Path) -> None:
    """We do, where a scheme of ours is asked for; else vLLM, whatever it makes of it here."""
    from quantload.engines.vllm_config import CLASSES
    from vllm.config import ModelConfig

    model = make(tmp_path, method)
    config = ModelConfig(model=str(model), quantization="quark_mxfp4", skip_tokenizer_init=True)
    assert config.quantization == "quark_mxfp4"
    theirs = ModelConfig(model=str(model), skip_tokenizer_init=True).quantization
    assert theirs is not None
    assert theirs not in CLASSES


@pytest.mark.usefixtures("_registered")
def test_what_is_not_read_here_is_refused_with_the_name_of_who_reads_it(folder: Path, tmp_path: Path) -> None:
    from vllm.config import ModelConfig

    described = json.loads((folder / "demo" / "config.json").read_text())
    for method, told in {"torchao": "leave the option out, and vLLM", "eetq": "name a checkpoint that is not"}.items():
        said = {**described, "quantization_config": {"quant_method": method}}
        (tmp_path / "config.json").write_text(json.dumps(said))
        with pytest.raises(PolicyError, match=f"quantized already, by {method}, which is not read here: {told}"):
            ModelConfig(model=str(tmp_path), quantization="quark_mxfp4", skip_tokenizer_init=True)


def test_only_our_load_format_decodes(folder: Path) -> None:
    with pytest.raises(PolicyError, match=r"quantized already \(awq\), and only --load-format quantload"):  # noqa: SIM117
        with running(folder / "awq" / "model", "quark_mxfp4", load_format="auto"):
            pass


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_says_what_load_quantized_makes_it_say(scheme: str, folder: Path, report: Path) -> None:
    name = f"quantload_{scheme}" if scheme in OWN_NAMES else scheme
    with running(folder / "demo", name) as engine:
        assert difference(log_probabilities(engine), expected(folder, "demo", scheme)) < CLOSE
    found = LoadReport.load(report)
    experts = [layer for layer in found.layers if layer.kind == "experts"]
    assert len(experts) == 7
    assert len(found.layers) == (7 if scheme == "experts_int8" else 21)
    assert found.checkpoint_bytes > sum(layer.bytes_in for layer in found.layers) > 8_000_000
    assert found.bytes_read >= found.checkpoint_bytes  # what is scaled by all of a tensor is read twice
    assert found.fallback_conversions == 0  # nothing was read whole


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {"large"}))
def test_architectures(name: str, folder: Path, report: Path) -> None:
    with running(folder / name, "quark_mxfp4") as engine:
        # Routers with random weights have near ties, which another attention decides otherwise now and then.
        close = FAR.get(name, CLOSE)
        assert difference(log_probabilities(engine), expected(folder, name), passed_over=3) < close
    assert LoadReport.load(report).fallback_conversions == 0  # nothing was read whole


def test_a_reload_makes_what_a_fresh_engine_has_and_that_of_one_expert_is_refused(folder: Path) -> None:
    with running(folder / "demo-b", "quark_mxfp4") as engine:
        fresh = log_probabilities(engine)
    with running(folder / "demo", "quark_mxfp4") as engine:
        first = log_probabilities(engine)
        held = {name: param.data_ptr() for name, param in model_of(engine).named_parameters()}
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / "demo-b")})
        assert log_probabilities(engine) == fresh
        files = (folder / "demo").glob("*.safetensors")
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        runner = engine.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(weights_iterator=iter(reversed(weights.items())))
        assert log_probabilities(engine) == first
        assert {name: param.data_ptr() for name, param in model_of(engine).named_parameters()} == held
        part = [(name, tensor) for name, tensor in weights.items() if "layers.0.mlp.experts.3." in name]
        with pytest.raises(MissingWeightsError, match=r"layers\.0\.mlp\.experts.*loaded, and reloaded, whole"):
            runner.reload_weights(weights_iterator=iter(part))


def test_what_is_kept_is_as_stored_and_is_reloaded_too(folder: Path) -> None:
    kept = {"quant_method": "quark_mxfp4", "ignore": ["*"]}
    options = {"hf_overrides": {"quantization_config": kept}}
    with running(folder / "demo-b", "quark_mxfp4", **options) as engine:
        fresh = log_probabilities(engine)
    with running(folder / "demo", "quark_mxfp4", **options) as engine:
        assert difference(log_probabilities(engine), expected(folder, "demo", "none")) < CLOSE
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / "demo-b")})
        assert log_probabilities(engine) == fresh


def test_the_peak_is_bounded_and_no_file_is_mapped(folder: Path, report: Path) -> None:
    with running(folder / "demo", "quark_mxfp4"):
        pass  # what is imported with the first engine is no part of a load
    stopped, mapped = threading.Event(), [_mapped_bytes()]

    def sample() -> None:
        while not stopped.wait(0.002):
            mapped.append(_mapped_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        with running(folder / "large", "quark_mxfp4"):
            pass
    finally:
        stopped.set()
        sampler.join()
    found = LoadReport.load(report)
    assert found.checkpoint_bytes > 3 * found.final_bytes > 150 << 20
    assert found.peak_bytes <= found.final_bytes + found.staging_peak_bytes + SLACK_BYTES
    assert max(mapped) - mapped[0] < 48 << 20


def _mapped_bytes() -> int:
    """Pages of files that are in the memory of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:"))
    return int(line.split()[1]) << 10


def test_two_ranks_read_their_own_experts(folder: Path, report: Path) -> None:
    found = in_other_processes(folder / "demo", tensor_parallel_size=2, enable_expert_parallel=True)
    assert difference(found, expected(folder, "demo")) < CLOSE
    reports = [LoadReport.load(f"{report}.rank{rank}") for rank in range(2)]
    assert [(each.rank, each.world_size, len(each.layers)) for each in reports] == [(0, 2, 21), (1, 2, 21)]
    for each in reports:
        assert each.bytes_read < 0.7 * each.checkpoint_bytes


def test_two_ranks_have_slices_of_the_codes_and_scales_of_one(folder: Path, tmp_path: Path) -> None:
    """Whatever a scale reaches over: a tensor, a row, or blocks; after reloads, too."""
    layers = {"o_proj": "fp8_per_channel", "0.self_attn.qkv_proj": "nvfp4", "1.self_attn.qkv_proj": "int8_per_channel"}
    experts = {"mlp.experts": "fp8_per_channel", "1.mlp.experts": "nvfp4", "2.mlp.experts": "quark_int4fp8_moe"}
    overrides = {f"*.{name}": scheme for name, scheme in {**layers, **experts}.items()}
    fields = {"quant_method": "quantload_fp8_per_tensor", "overrides": overrides}
    options: dict[str, Any] = {"hf_overrides": {"quantization_config": fields}}
    with running(folder / "demo", "quantload_fp8_per_tensor", **options) as engine:
        said = log_probabilities(engine)
        whole = {name: tensor.clone() for name, tensor in quantized_tensors(model_of(engine)).items()}
        sizes = {name: module.output_sizes for name, module in model_of(engine).named_modules() if "qkv" in name}
    options |= {"quantized_tensors": str(tmp_path), "reloaded": [str(folder / "demo-b"), str(folder / "demo")]}
    found = in_other_processes(folder / "demo", "quantload_fp8_per_tensor", tensor_parallel_size=2, **options)
    assert difference(found, said) < CLOSE
    for when, rank in itertools.product(("loaded", "reloaded"), range(2)):
        own = load_file(tmp_path / when / f"rank{rank}.safetensors")
        assert own.keys() == whole.keys()
        for name, tensor in own.items():
            assert torch.equal(tensor, part_of(whole[name], tensor, name, sizes, rank)), name


def part_of(whole: Tensor, own: Tensor, name: str, sizes: dict[str, list[int]], rank: int) -> Tensor:
    """What a rank of two has of a tensor: half of it, or of each of its parts, where it is not all of it."""
    by_columns = "o_proj" in name or "w2_weight" in name
    dim = whole.dim() - (1 if by_columns else 2)
    if whole.shape[dim] == own.shape[dim]:
        return whole
    shares = sizes.get(name.rpartition(".")[0], [1, 1] if "w13_weight" in name else [1])
    parts = whole.split([share * whole.shape[dim] // sum(shares) for share in shares], dim)
    return torch.cat([part.chunk(2, dim)[rank] for part in parts], dim)


def test_stages_of_a_pipeline_read_their_own_layers(folder: Path, report: Path) -> None:
    # vLLM 0.32 itself runs no second stage on a CPU without compiling it.
    found = in_other_processes(folder / "demo", pipeline_parallel_size=2, enforce_eager=False)
    assert difference(found, expected(folder, "demo")) < CLOSE
    reports = [LoadReport.load(f"{report}.rank{rank}") for rank in range(2)]
    assert sum(len(each.layers) for each in reports) == 21
    for each in reports:
        assert each.bytes_read < 0.75 * each.checkpoint_bytes


def test_lora_adapters_add_to_quantized_layers(folder: Path) -> None:
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["qkv_proj", "o_proj"]}
    with running(folder / "demo", "quark_mxfp4", **options) as engine:
        with_adapter = log_probabilities(engine, lora_request=LoRARequest("one", 1, str(folder / "demo.lora")))
        assert difference(with_adapter, expected(folder, "demo", "quark_mxfp4+lora")) < CLOSE
        assert difference(with_adapter, expected(folder, "demo")) > 4 * CLOSE
        assert difference(log_probabilities(engine), expected(folder, "demo")) < CLOSE


def test_lora_adapters_on_quantized_experts_are_refused(folder: Path) -> None:
    with pytest.raises(PolicyError, match=r"mlp\.experts: vLLM puts LoRA adapters on experts"):  # noqa: SIM117
        with running(folder / "demo", "quark_mxfp4", enable_lora=True):
            pass


@pytest.mark.parametrize(
    "options",
    [{"model_impl": "transformers"}, {"enforce_eager": False}, {"load_format": "auto"}],
    ids=["transformers", "compiled", "vLLM's own reader"],
)
def test_other_ways_to_the_same(options: dict[str, Any], folder: Path) -> None:
    with running(folder / "demo", "quark_mxfp4", **options) as engine:
        assert difference(log_probabilities(engine), expected(folder, "demo")) < CLOSE


def test_weights_that_are_made_up_are_numbers(folder: Path) -> None:
    with running(folder / "demo", "quark_mxfp4", load_format="dummy") as engine:
        assert torch.tensor(log_probabilities(engine)).isfinite().all()


def test_what_is_ignored_stays_as_stored_and_unknown_options_are_named(folder: Path, report: Path) -> None:
    def asked(**fields: Any) -> dict[str, Any]:
        return {"hf_overrides": {"quantization_config": {"quant_method": "quark_mxfp4", **fields}}}

    ignore = ["re:.*layers\\.0\\.self_attn\\.[qkv]_proj", "model.layers.1.mlp.experts"]
    with running(folder / "demo", "quark_mxfp4", **asked(ignore=ignore)) as engine:
        assert torch.tensor(log_probabilities(engine)).isfinite().all()
    kept = {each.name: each.reason for each in LoadReport.load(report).kept}
    assert "ignored by pattern" in kept["model.layers.0.self_attn.qkv_proj"]
    assert any("ignored by pattern" in reason for name, reason in kept.items() if "layers.1.mlp.experts" in name)
    with pytest.raises(PolicyError, match=r"run as one.*q_proj: ignored.*k_proj: quark_mxfp4"):  # noqa: SIM117
        with running(folder / "demo", "quark_mxfp4", **asked(ignore=["re:.*q_proj"])):
            pass
    with pytest.raises(PolicyError, match="quantization_config has scheem"):  # noqa: SIM117
        with running(folder / "demo", "quark_mxfp4", **asked(scheem="x")):
            pass


def test_a_checkpoint_of_pickles_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "demo" / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises((UnsupportedCheckpointError, RuntimeError)):  # noqa: SIM117
        with running(tmp_path, "quark_mxfp4"):
            pass
