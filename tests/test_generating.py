"""A prompt becomes token ids, and the answer to it text: the same for the same seed, piece by piece or whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from quantload import load_quantized
from quantload.checkpoint.resolve import resolve
from quantload.cli import DEMO_MODEL
from quantload.errors import CheckpointError, PolicyError, UnsupportedCheckpointError
from quantload.generating import Prompt, answer, read_prompt

TEXT = "def read_lines(path):\n"


def read(folder: Path, text: str = TEXT, raw: bool = False, max_new_tokens: int | None = None) -> Prompt:
    return read_prompt(resolve(folder), text, raw=raw, max_new_tokens=max_new_tokens, trust_remote_code=False)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_quantized(DEMO_MODEL, "quark_mxfp4", progress=False)


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """What the demo model has beside its weights, with a chat template that says who speaks."""
    folder = tmp_path / "chat"
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}# {% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_prompt_is_a_message_where_there_is_a_chat_template(chat: Path) -> None:
    asked, raw = read(chat, "hello"), read(chat, "hello", raw=True)
    assert (asked.is_chat, asked.tokenizer.decode(asked.ids[0])) == (True, "user:hello\n# ")
    assert (raw.is_chat, raw.tokenizer.decode(raw.ids[0])) == (False, "hello")
    (chat / "chat_template.jinja").unlink()
    assert torch.equal(read(chat, "hello").ids, raw.ids)


def test_what_the_chat_template_or_the_context_refuses_is_told(chat: Path) -> None:
    (chat / "chat_template.jinja").write_text("{{ raise_exception('only for poets') }}")
    with pytest.raises(PolicyError, match="refused the prompt: only for poets; --raw"):
        read(chat)
    with pytest.raises(PolicyError, match="empty: it has no tokens"):
        read(chat, "", raw=True)
    context = json.loads((chat / "config.json").read_text())["max_position_embeddings"]
    count = read(chat, raw=True).ids.shape[-1]
    assert read(chat, raw=True, max_new_tokens=context - count).max_new_tokens == context - count
    with pytest.raises(PolicyError, match=f"is {context} tokens: the prompt has {count}, and {context} are to be"):
        read(chat, raw=True, max_new_tokens=context)
    with pytest.raises(PolicyError, match="at least 1 are to be"):
        read(chat, "x " * context, raw=True)


def test_what_answers_no_text_is_refused_before_a_weight_is_read(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="BertForMaskedLM, does not generate at all"):
        read(checkpoint("bert"))
    with pytest.raises(CheckpointError, match="has no tokenizer or processor"):
        read(checkpoint("llama"))


def test_an_answer_is_what_the_model_generates_whole_and_piece_by_piece(demo: Any) -> None:
    asked, pieces = read(DEMO_MODEL, max_new_tokens=24), list[str]()
    told = answer(demo, asked, temperature=0, seed=1, on_text=pieces.append)
    made = demo.generate(asked.ids, max_new_tokens=24, do_sample=False)[0, asked.ids.shape[-1] :]
    assert told.text == asked.tokenizer.decode(made, skip_special_tokens=True) == "".join(pieces)
    assert (told.tokens, told.finish_reason) == (24, "length")
    assert len(pieces) > 4


def test_a_seed_says_what_is_sampled(demo: Any) -> None:
    asked = read(DEMO_MODEL, max_new_tokens=24)
    one, same, other = (answer(demo, asked, temperature=1.0, seed=seed).text for seed in (7, 7, 8))
    assert one == same != other


def test_an_end_token_ends_it(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = read(DEMO_MODEL, max_new_tokens=24)
    made = demo.generate(asked.ids, max_new_tokens=3, do_sample=False)[0]
    monkeypatch.setattr(demo.generation_config, "eos_token_id", int(made[-1]))
    assert answer(demo, asked, temperature=0, seed=1)[1:3] == (3, "stop")


class Words:
    """A tokenizer of numbers."""

    def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        return "".join(f"{int(token)} " for token in tokens)


@pytest.mark.parametrize(("name", "beams"), [("t5", 1), ("llama", 2)])
def test_encoders_and_beams_answer_too(name: str, beams: int) -> None:
    torch.manual_seed(0)
    architecture = BY_NAME[name]
    model: Any = architecture.model_class(architecture.config()).eval()
    model.generation_config.num_beams, model.generation_config.eos_token_id = beams, None
    ids, pieces = torch.arange(3, 9).view(1, -1), list[str]()
    told = answer(model, Prompt(ids, Words(), False, 5), temperature=0, seed=1, on_text=pieces.append)
    assert (told.tokens, told.finish_reason) == (5, "length")
    assert "".join(pieces) == told.text
