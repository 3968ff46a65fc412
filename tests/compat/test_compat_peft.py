"""PEFT on quantized layers: adapters learn, are saved and come back; what cannot be says why."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

peft = pytest.importorskip("peft", reason="peft is not installed")

from quantload import QuantloadConfig  # noqa: E402
from quantload.cli import DEMO_MODEL  # noqa: E402
from quantload.engines.peft import QuantizedLoraLinear, for_quantized  # noqa: E402
from quantload.errors import PolicyError, QuantizedWeightError  # noqa: E402
from quantload.model.quantized import QuantizedLinear  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

pytestmark = pytest.mark.compat
IDS = torch.tensor([[5, 9, 23, 54, 8, 40]])


def loaded(**given: Any) -> Any:
    config = QuantloadConfig("quark_mxfp4", progress=False)
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=config, **given)


def adapted(**given: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **given)
    return peft.get_peft_model(loaded(), for_quantized(config))


def test_a_new_adapter_changes_nothing_and_then_learns() -> None:
    model, before = adapted(), loaded()
    layers = [module for module in model.modules() if isinstance(module, QuantizedLoraLinear)]
    assert len(layers) == 2 * model.config.num_hidden_layers
    assert torch.equal(model(IDS).logits, before(IDS).logits)
    codes = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    base = model.unload()
    assert all(torch.equal(tensor, codes[name]) for name, tensor in base.state_dict().items())


def test_gradients_are_those_of_the_dequantized_model() -> None:
    model = loaded(dtype=torch.float32)
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = torch.nn.Parameter(module.dequantize())
            twin.set_submodule(name, linear)
    grads = []
    for each in (model, twin):
        inputs = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=inputs, labels=IDS).loss.backward()
        grads.append(inputs.grad)
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 0.02


def test_an_adapter_is_saved_and_comes_back(tmp_path: Path) -> None:
    model = adapted(init_lora_weights=False)
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    config = for_quantized(peft.PeftConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(loaded(), tmp_path, config=config)
    assert torch.equal(again(IDS).logits, want)
    assert not torch.equal(again(IDS).logits, loaded()(IDS).logits)


def test_transformers_own_adapters_take_it() -> None:
    model = loaded()
    config = for_quantized(peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} takes no PEFT {peft.__version__}")
    changed = model(IDS).logits
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, loaded()(IDS).logits)
    assert not torch.equal(changed, model(IDS).logits)


def test_a_merge_says_why_not() -> None:
    with pytest.raises(PolicyError, match="cannot be merged into codes of quark_mxfp4"):
        adapted().merge_and_unload()


def test_variants_that_compute_with_the_weight_are_refused() -> None:
    with pytest.raises(PolicyError, match="use_dora is set"):
        adapted(use_dora=True)


def test_without_the_hook_peft_refuses_and_experts_are_not_numbers() -> None:
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(loaded(), peft.LoraConfig(target_modules=["q_proj"]))
    config = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises((QuantizedWeightError, ValueError, RuntimeError)):
        peft.get_peft_model(loaded(), config)(IDS)
