"""What a Ctrl-C does while global state is changed, and what is left of it after a clean-up that failed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from quantload import load_quantized
from quantload.cli import DEMO_MODEL
from quantload.cli.preparing import libraries
from quantload.interrupts import interrupt_first, interrupt_held, interrupt_kept, raise_forgotten
from quantload.recording import Recorder
from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def python_handler() -> Iterator[None]:
    """Python's own, whatever a test before left; that one is put back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def hold(interrupts: int, done: list[bool], error: Exception | None = None) -> None:
    with interrupt_held():
        for _ in range(interrupts):
            interrupt()
        done.append(True)
        if error is not None:
            raise error


def test_a_first_interrupt_waits_for_the_end() -> None:
    done: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        hold(1, done)
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait() -> None:
    done: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        hold(2, done)
    assert not done


def test_an_interrupt_is_not_lost_where_what_held_it_fails() -> None:
    with pytest.raises(KeyboardInterrupt):
        hold(1, [], ValueError("of what it did"))


def test_a_handler_of_the_user_is_called_once() -> None:
    called: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: called.append(number))
    with interrupt_held():
        interrupt()
        assert not called
    assert called == [signal.SIGINT]


@pytest.mark.parametrize("ignored", [True, False])
def test_nothing_changes_where_nothing_would_be_raised(ignored: bool) -> None:
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    before, seen = signal.getsignal(signal.SIGINT), []

    def look() -> None:
        with interrupt_held():
            seen.append(signal.getsignal(signal.SIGINT))

    if ignored:
        look()
    else:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [before]


def cleaned_up_badly() -> None:
    with interrupt_first():
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("trying to pop from empty mode stack")


def fails_while_another_is_handled() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with interrupt_first():
            raise ValueError("another") from None


def test_what_a_clean_up_raises_does_not_hide_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        cleaned_up_badly()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_error_during_the_handling_of_an_earlier_interrupt_is_an_error() -> None:
    with pytest.raises(ValueError, match="another"):
        fails_while_another_is_handled()


def import_and_interrupt(done: list[bool]) -> None:
    with libraries():
        interrupt()
        done.append(True)


def test_an_interrupt_waits_for_the_libraries_of_a_command() -> None:
    """In the middle of torch's import of numpy it was swallowed, and ended in a `RecursionError` of numpy's."""
    done: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        import_and_interrupt(done)
    assert done


@pytest.mark.parametrize("where", ["get_init_context", "_finalize_model_loading"])
def test_an_interrupted_load_leaves_torch_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the very middle of what changes modes and the default dtype."""
    cls = PreTrainedModel
    original = getattr(cls, where).__func__ if where == "get_init_context" else getattr(cls, where)

    def interrupted(*given: object) -> object:
        interrupt()
        return original(*given)

    monkeypatch.setattr(cls, where, classmethod(interrupted) if where == "get_init_context" else interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_quantized(DEMO_MODEL, "quark_mxfp4", progress=False)
    monkeypatch.undo()
    assert torch.empty(0).device.type == "cpu"
    assert torch.get_default_dtype() == torch.float32
    assert load_quantized(DEMO_MODEL, "quark_mxfp4", progress=False).load_report.layers


class Interrupted:
    """Its destructor is interrupted: Python prints the `KeyboardInterrupt` there and goes on."""

    def __del__(self) -> None:
        interrupt()


def forget_one(done: list[str], *, look: bool = False, error: Exception | None = None) -> None:
    with interrupt_kept():
        Interrupted()
        done.append("went on")
        if error is not None:
            raise error
        if look:
            raise_forgotten()
            done.append("did not see it")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("given", [{}, {"look": True}, {"error": ValueError("of what went on")}], ids=str)
def test_an_interrupt_that_python_forgets_is_kept(given: dict[str, Any]) -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        forget_one(done, **given)
    assert done == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    raise_forgotten()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_load_ends_with_an_interrupt_that_python_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Recorder.begin

    def begin(recorder: Recorder, phase: str) -> None:
        if phase == "stream":
            Interrupted()
        original(recorder, phase)

    monkeypatch.setattr(Recorder, "begin", begin)
    with pytest.raises(KeyboardInterrupt):
        load_quantized(DEMO_MODEL, "quark_mxfp4", progress=False)


def test_a_handler_that_raises_nothing_ends_nothing() -> None:
    called: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: called.append(number))
    with interrupt_kept():
        interrupt()
        raise_forgotten()
    assert called == [signal.SIGINT]
