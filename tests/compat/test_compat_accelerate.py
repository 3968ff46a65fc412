"""accelerate on quantized models, and `transformers serve`, which asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
hooks = pytest.importorskip("accelerate.hooks")

from quantload import QuantloadConfig  # noqa: E402
from quantload.cli import DEMO_MODEL  # noqa: E402
from quantload.errors import QuantizedWeightError  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

pytestmark = pytest.mark.compat
IDS = torch.tensor([[5, 9, 23, 54, 8, 40]])


@pytest.fixture
def model() -> Any:
    """With the device named, for which transformers asks accelerate."""
    config = QuantloadConfig("quark_mxfp4", progress=False)
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=config, device_map="cpu")


class Seen(hooks.ModelHook):  # type: ignore[misc,name-defined]  # accelerate's classes are not typed
    """Counts the calls of modules."""

    calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Arguments as they are."""
        self.calls += 1
        return args, kwargs


def test_hooks_on_modules_are_called_and_change_nothing(model: Any) -> None:
    want, hook = model(IDS).logits, Seen()
    for module in model.modules():
        hooks.add_hook_to_module(module, hook)
    assert torch.equal(model(IDS).logits, want)
    assert hook.calls > 50
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(IDS).logits, want)


def test_what_takes_weights_for_numbers_is_refused(model: Any) -> None:
    """Offloading, and spreading over devices, which move each weight for itself."""
    with pytest.raises(QuantizedWeightError, match=r"q_proj\.weight holds codes of a quantized weight"):
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(QuantizedWeightError, match=r"as when accelerate offloads a module.*load the model anew"):
        model(IDS)


def test_transformers_serve_answers_with_a_saved_model(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    import uvicorn
    from transformers.cli.serve import Serve

    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.save_pretrained(tmp_path)
    served: list[Any] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: served.append(self.config.app))
    server = Serve(force_model=str(tmp_path), device="cpu")
    prompt = "def read_lines(path):"
    asked = {"model": str(tmp_path), "prompt": prompt, "max_tokens": 8, "temperature": 0}
    with testclient.TestClient(served[0]) as client:
        answer = client.post("/v1/completions", json=asked)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    want = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert answer.json()["choices"][0]["text"] == tokenizer.decode(want, skip_special_tokens=True)
    server.reset_loaded_models()
