from __future__ import annotations

import threading
import time

import pytest
import torch
from quantload.checkpoint.crew import Crew, Stopped
from quantload.errors import LoadCancelledError, MemoryBudgetError


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("quantload-reader")]


def wait_for_stop(crew: Crew, number: int) -> None:
    deadline = time.monotonic() + 30
    while not crew.stopping:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    raise Stopped


def test_runs_every_worker_under_its_name() -> None:
    names: set[str] = set()
    Crew(3, None).work(lambda crew, number: names.add(f"{number} {threading.current_thread().name}"))
    assert names == {f"{number} quantload-reader-{number}" for number in range(3)}
    assert alive() == []


def test_the_first_error_stops_the_others() -> None:
    def body(crew: Crew, number: int) -> None:
        if number == 1:
            raise KeyError("what went wrong")
        wait_for_stop(crew, number)

    with pytest.raises(KeyError, match="what went wrong") as caught:
        Crew(3, None).work(body)
    assert caught.traceback[-1].name == "body", "the traceback leads to the place in the worker"
    assert alive() == []


def test_later_errors_become_notes() -> None:
    def body(crew: Crew, number: int) -> None:
        if number == 0:
            raise ValueError("first")
        try:
            wait_for_stop(crew, number)
        except Stopped:
            raise OSError(f"worker {number}") from None

    with pytest.raises(ValueError, match="first") as caught:
        Crew(3, None).work(body)
    assert sorted(caught.value.__notes__) == [f"another reader failed too: OSError: worker {n}" for n in (1, 2)]


def test_cancel() -> None:
    cancel = threading.Event()
    threading.Timer(0.05, cancel.set).start()
    with pytest.raises(LoadCancelledError, match="start it again"):
        Crew(2, cancel).work(wait_for_stop)
    assert alive() == []


def test_cancel_after_the_work_is_done_changes_nothing() -> None:
    cancel = threading.Event()
    cancel.set()
    Crew(2, cancel).work(lambda crew, number: None)


def test_ticks_in_the_calling_thread_and_their_errors_stop_the_work() -> None:
    def tick() -> None:
        assert threading.current_thread() is threading.main_thread()
        raise RuntimeError("display is gone")

    with pytest.raises(RuntimeError, match="display is gone"):
        Crew(2, None).work(wait_for_stop, tick)
    assert alive() == []


def test_threads_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "quantload-reader-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MemoryBudgetError, match="thread 2 of the 3 that read and quantize could not be started"):
        Crew(3, None).work(wait_for_stop)
    assert alive() == []


def test_torch_runs_on_one_thread_inside_and_as_before_outside() -> None:
    before = torch.get_num_threads()
    inside: list[int] = []
    ones = torch.ones(1 << 20)

    def body(crew: Crew, number: int) -> None:
        ones.add(1).sum()  # torch sets up a thread when it first has work for it
        inside.append(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        Crew(2, None).work(body)
        assert inside == [1, 1]
        assert torch.get_num_threads() == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)


def test_who_puts_something_else_into_the_place_of_torchs_function_is_not_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", called.append)
    inside: list[int] = []
    Crew(2, None).work(lambda crew, number: inside.append(torch.get_num_threads()))
    assert inside == [1, 1]
    assert called == []
