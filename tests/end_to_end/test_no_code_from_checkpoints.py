"""No checkpoint runs code of its own: each way to have it run is tried, and leaves no mark."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantload
import torch
from quantload import convert_checkpoint, load_quantized, plan_quantized
from quantload.checkpoint.resolve import resolve
from quantload.errors import QuantloadError
from quantload.server.processors import try_processor
from quantload.tokenizer import load_processor
from transformers import AutoConfig, AutoTokenizer

DEMO = Path(quantload.__file__).parent / "demo_model"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


class Evil:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


class Subject:
    """A copy of the demo model to spoil, and the mark that its code would leave."""

    def __init__(self, root: Path) -> None:
        self.folder, self.mark = Path(shutil.copytree(DEMO, root / "model")), root / "ran"

    def set(self, name: str, **fields: Any) -> None:
        """Fields of a JSON file of it."""
        path = self.folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))

    def code(self, name: str) -> None:
        """A Python file that leaves the mark when it is imported, with classes of the names that are looked for."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"open({str(self.mark)!r}, 'w').close()\n"
        text += "from transformers import PretrainedConfig, PreTrainedTokenizerFast, Qwen3MoeForCausalLM\n"
        text += "class Config(PretrainedConfig):\n    model_type = 'evil'\n"
        text += "class Model(Qwen3MoeForCausalLM): pass\nclass Tokenizer(PreTrainedTokenizerFast): pass\n"
        path.write_text(text + "def generate(*_, **__): pass\n")

    def pickled(self, name: str) -> None:
        """A pickle that leaves the mark when it is opened."""
        (self.folder / name).write_bytes(pickle.dumps(Evil(self.mark)))


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(tmp_path)


def generate(folder: Path) -> None:
    """Load it and let it say something."""
    model: Any = load_quantized(folder, "none", progress=False)
    model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=1)


def use(subject: Subject, out: Path | None) -> list[str]:
    """What can be done with a checkpoint, with `out` also what reads its weights; the errors, in short."""
    folder, said = subject.folder, []
    ways: list[Callable[[], object]] = [
        lambda: plan_quantized(folder),
        lambda: load_processor(resolve(folder), False),
        lambda: try_processor(resolve(folder), False),
    ]
    if out is not None:
        ways += [lambda: generate(folder), lambda: convert_checkpoint(folder, out, "quark_mxfp4", progress=False)]
    for do in ways:
        try:
            do()
        except QuantloadError as error:
            said.append(type(error).__name__)
    return said


def everything(subject: Subject) -> None:
    """All that can lie in a folder beside a model and is not asked for."""
    for name in (
        "modeling.py", "configuration.py", "tokenization.py", "processing.py", "__init__.py", "sitecustomize.py",
        "qwen3_moe.py", "modeling_qwen3_moe.py", "custom_generate/generate.py", "generate.py", "setup.py",
    ):  # fmt: skip
        subject.code(name)
    for name in (
        "pytorch_model.bin", "model.pt", "optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth",
        "adapter_model.bin", "tokenizer.model", "tf_model.h5", "state_dict.pkl", "vocab.pkl",
    ):  # fmt: skip
        subject.pickled(name)
    (subject.folder / "custom_generate" / "requirements.txt").write_text("evil\n")
    (subject.folder / "requirements.txt").write_text("evil\n")
    subject.set("pytorch_model.bin.index.json", weight_map={"lm_head.weight": "pytorch_model.bin"})


def test_what_lies_beside_a_model_is_not_run(subject: Subject, tmp_path: Path) -> None:
    everything(subject)
    assert use(subject, tmp_path / "out") == []
    assert not subject.mark.exists()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


AUTO = dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), "modeling.Model")
TRIES: dict[str, Callable[[Subject], None]] = {
    "a class of a model": lambda s: s.set("config.json", auto_map={"AutoConfig": "modeling.Config", **AUTO}),
    "a class that is unknown": lambda s: s.set(
        "config.json", auto_map={"AutoConfig": "modeling.Config", **AUTO}, model_type="evil", architectures=["Model"]
    ),
    "a class of another repository": lambda s: s.set(
        "config.json", auto_map={"AutoConfig": f"{s.folder}--modeling.Config", "AutoModel": "evil/x--modeling.Model"}
    ),
    "a class by its path": lambda s: s.set("config.json", architectures=["modeling.Model", "../modeling.Model"]),
    "a tokenizer": lambda s: s.set(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.Tokenizer", "modeling.Tokenizer"]}
    ),
    "a tokenizer of an unknown class": lambda s: s.set(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.Tokenizer", None]}, tokenizer_class="Tokenizer"
    ),
    "a tokenizer by its path": lambda s: s.set("tokenizer_config.json", tokenizer_class="modeling.Tokenizer"),
    "a processor": lambda s: s.set(
        "processor_config.json", auto_map={"AutoProcessor": "modeling.Tokenizer"}, processor_class="Tokenizer"
    ),
    "an image processor": lambda s: s.set(
        "preprocessor_config.json",
        auto_map={"AutoImageProcessor": "modeling.Tokenizer"},
        image_processor_type="Tokenizer",
    ),
    "a way to generate": lambda s: s.set("generation_config.json", custom_generate=str(s.folder)),
    "a way to generate, in the config": lambda s: s.set("config.json", custom_generate=str(s.folder)),
    "attention of the hub": lambda s: s.set("config.json", attn_implementation="evil/attention"),
    "attention of the hub, privately": lambda s: s.set("config.json", _attn_implementation="evil/attention:run"),
    "a quantization": lambda s: s.set("config.json", quantization_config={"quant_method": "modeling.Model"}),
    "a function for an activation": lambda s: s.set("config.json", hidden_act="os.system"),
    "a dtype": lambda s: s.set("config.json", dtype="__import__('modeling')", torch_dtype="modeling.Model"),
    "an adapter": lambda s: s.set(
        "adapter_config.json", base_model_name_or_path=str(s.folder), auto_mapping={"parent_library": "modeling"}
    ),
    "a shard that is a pickle": lambda s: s.pickled(SHARDS[0]),
    "a shard in an index that is a pickle": lambda s: s.set(
        INDEX, weight_map=dict.fromkeys(json.loads((s.folder / INDEX).read_text())["weight_map"], "pytorch_model.bin")
    ),
    "a config that is a pickle": lambda s: s.pickled("config.json"),
    "a tokenizer that is a pickle": lambda s: s.pickled("tokenizer.json"),
}
REFUSED = {
    "a class that is unknown", "a class by its path", "attention of the hub", "attention of the hub, privately",
    "a quantization", "a function for an activation", "a dtype", "a shard that is a pickle",
    "a shard in an index that is a pickle", "a config that is a pickle", "a tokenizer that is a pickle",
}  # fmt: skip
WITH_WEIGHTS = {"a way to generate", "an adapter", "a shard that is a pickle"}


@pytest.mark.parametrize("name", TRIES)
def test_what_files_name_is_not_run(subject: Subject, tmp_path: Path, name: str) -> None:
    everything(subject)
    TRIES[name](subject)
    said = use(subject, tmp_path / "out" if name in WITH_WEIGHTS else None)
    assert not subject.mark.exists()
    if name in REFUSED:
        assert said
    files = [getattr(module, "__file__", None) or "" for module in [*sys.modules.values()]]
    assert not [file for file in files if file.startswith(str(subject.folder))]


def test_the_code_would_run_if_it_were_trusted(subject: Subject) -> None:
    """What the tries above are worth: where it is allowed, each of these leaves its mark."""
    everything(subject)
    ways: list[Callable[[], object]] = [
        lambda: pickle.loads((subject.folder / "pytorch_model.bin").read_bytes()),
        lambda: AutoConfig.from_pretrained(subject.folder, trust_remote_code=True),
        lambda: AutoTokenizer.from_pretrained(subject.folder, trust_remote_code=True),
    ]
    for run in ways:
        subject.set("config.json", auto_map={"AutoConfig": "modeling.Config"}, model_type="evil")
        subject.set("tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.Tokenizer", "modeling.Tokenizer"]})
        subject.mark.unlink(missing_ok=True)
        run()
        assert subject.mark.exists()
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]
