"""Other ranks make every call of the forward that the first one makes, with caches of their own."""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from quantload.errors import PolicyError, RankError, UnsupportedCheckpointError
from quantload.ranks import lockstep
from quantload.ranks.lockstep import Leader, follow


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    architecture = BY_NAME[name]
    return architecture.model_class(architecture.config()).eval()


class Follower:
    """Another rank, in a thread; `logits` are those of its calls."""

    def __init__(self, model: Any) -> None:
        self.logits: list[torch.Tensor] = []
        model.register_forward_hook(lambda *given: self.logits.append(given[-1].logits.clone()))
        self.asked: list[Any] = []
        self.thread = threading.Thread(target=follow, args=(model, self._do))
        self.thread.start()

    def _do(self, asked: Any) -> None:
        self.asked.append(asked)
        if asked == "fail":
            raise PolicyError("it cannot be done")


@pytest.fixture
def follower(monkeypatch: pytest.MonkeyPatch) -> Iterator[Follower]:
    said: queue.Queue[bytes] = queue.Queue()
    monkeypatch.setattr(lockstep, "_tell", lambda call: said.put(pickle.dumps(call)))
    monkeypatch.setattr(lockstep, "_hear", lambda: pickle.loads(said.get(timeout=60)))
    found = Follower(model_of("llama"))
    yield found
    said.put(pickle.dumps(None))
    found.thread.join(60)


def test_it_follows_generations_one_after_the_other_whatever_is_chosen(follower: Follower) -> None:
    model, own = model_of("llama"), []
    leader = Leader(model)
    model.register_forward_hook(lambda *given: own.append(given[-1].logits.clone()))
    ids = torch.arange(8, 16).view(1, -1)
    for sample in (False, True):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=sample, tokenizer=object())
    leader.stop()
    follower.thread.join(60)
    assert len(own) == 8
    assert all(map(torch.equal, own, follower.logits))
    assert len(own) == len(follower.logits)


def test_it_follows_beams(follower: Follower) -> None:
    model, own = model_of("llama"), []
    leader = Leader(model)
    model.register_forward_hook(lambda *given: own.append(given[-1].logits.clone()))
    ids = torch.arange(8, 16).view(1, -1)
    chosen = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False)
    alone = model_of("llama").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False
    )
    leader.stop()
    follower.thread.join(60)
    assert torch.equal(chosen, alone)
    assert len(own) == len(follower.logits) == 6
    assert all(map(torch.equal, own, follower.logits))
    assert len(leader._gone) == 1  # the cache went with its generation, and not when the collector came by


def test_what_is_no_forward_is_done_by_all(follower: Follower) -> None:
    model = model_of("llama")
    leader = Leader(model)
    assert leader.together("reload", lambda: 3) == 3
    with pytest.raises(ValueError, match="own"):
        leader.together("fail", lambda: [int(x) for x in ["own"]])
    model(input_ids=torch.ones(1, 2, dtype=torch.long))  # they are still at the same point
    leader.stop()
    follower.thread.join(60)
    assert follower.asked == ["reload", "fail"]
    assert len(follower.logits) == 1


def test_after_a_forward_that_failed_nothing_more_is_computed(follower: Follower) -> None:
    model = model_of("llama")
    leader = Leader(model)
    leader._forward = lambda **_: [][0]
    with pytest.raises(IndexError):
        model(input_ids=torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(RankError, match="no longer at the same point: list index out of range"):
        model(input_ids=torch.ones(1, 2, dtype=torch.long))


def test_what_cannot_be_told_is_refused(follower: Follower) -> None:
    model = model_of("llama")
    Leader(model)
    with pytest.raises(RankError, match="a Thread, given as attention_mask, cannot be told"):
        model(input_ids=torch.ones(1, 2, dtype=torch.long), attention_mask=threading.Thread())


def test_a_model_that_does_more_between_its_forwards_is_refused() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="has an encoder"):
        Leader(model_of("t5"))
