from __future__ import annotations

from typing import Any

import pytest
import torch
from quantload.server.logprobs import (
    LEAST,
    Chosen,
    LogprobNotes,
    TokenLog,
    TokenTexts,
    bytes_of_piece,
    completion_logprobs,
)


@pytest.mark.parametrize(
    ("piece", "data"),
    [("<0xE2>", b"\xe2"), ("<0xZZ>", None), ("Ġthe", b" the"), ("âĤ", b"\xe2\x82"), ("▁the", None), ("Ċ", b"\n")],
)
def test_the_bytes_of_a_piece(piece: str, data: bytes | None) -> None:
    assert bytes_of_piece(piece) == data


def test_parts_of_a_character_have_their_bytes_and_one_place(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    ids = tokenizer("a🦊b")["input_ids"]
    assert b"".join(texts[token].data or b"" for token in ids) == "a🦊b".encode()
    tokens = TokenLog([Chosen(token, -1.0, ()) for token in [*ids, tokenizer.eos_token_id]], texts).take()
    assert len(tokens) == len(ids)  # the special token is no part of the text
    told = completion_logprobs(tokens, texts)
    assert (told["tokens"][0], told["tokens"][-1]) == ("a", "b")
    assert (told["text_offset"][0], told["text_offset"][1], told["text_offset"][-1]) == (0, 1, 2)
    if len(ids) > 3:
        assert told["tokens"][1].startswith("bytes:\\xf0")


def test_tokens_come_as_the_text_grows(tokenizer: Any) -> None:
    ids = tokenizer("the quick")["input_ids"]
    log = TokenLog([Chosen(token, -1.0, ()) for token in ids], TokenTexts(tokenizer))
    assert log.take(0) == []
    first = log.take(1)
    assert [token.offset for token in first] == [0]
    rest = log.take(len("the quick"))
    assert "".join(token.text.text for token in first + rest) == "the quick"
    assert log.take() == []


def test_what_is_no_number_becomes_the_least(tokenizer: Any) -> None:
    model = torch.nn.Identity()
    notes = LogprobNotes(2, [])
    with notes.watching(model), pytest.raises(RuntimeError, match="no logits"):
        notes.note(1)

    class Output:
        logits = torch.tensor([[[0.0, 0.0, float("-inf")]]])

    notes._see(model, (), Output())
    notes.note(2)
    assert notes.chosen[0].logprob == LEAST
    assert [logprob for _, logprob in notes.chosen[0].likely] == pytest.approx([-0.6931, -0.6931], abs=1e-4)
