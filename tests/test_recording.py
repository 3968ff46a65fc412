"""What a load that somebody else drives writes down: no plan, layers as they come, one report a rank."""

from __future__ import annotations

import threading

import pytest
import torch
from quantload import load_quantized
from quantload.checkpoint.reader import ReadTotals
from quantload.cli import DEMO_MODEL
from quantload.errors import LoadCancelledError
from quantload.kernels.statistics import new_statistics
from quantload.memory.attempt import attempt_behind
from quantload.model.skeleton import Assignment
from quantload.options import LoadOptions
from quantload.progress import Moment
from quantload.recording import Expected, Recorder, tensor_bytes
from quantload.schemes.registry import SchemeFactory
from torch import nn

CPU = torch.device("cpu")


class Canceller:
    """Is told of phases, and cancels the load when one of them begins."""

    def __init__(self, at: str) -> None:
        self.at, self.seen = at, list[str]()

    def __call__(self, done: int, total: int) -> None:
        raise AssertionError("who watches is told everything, and not this too")

    def watch(self, moment: Moment) -> None:
        self.seen.append(moment.phase)
        if moment.phase == self.at:
            raise LoadCancelledError(f"in {self.at}")


@pytest.mark.parametrize("phase", ["resolve", "plan", "compile", "check", "stream", "finish"])
def test_who_watches_cancels_in_any_phase_and_the_error_says_where_it_was(phase: str) -> None:
    watcher = Canceller(phase)
    threads = threading.active_count()
    with pytest.raises(LoadCancelledError, match=f"in {phase}") as caught:
        load_quantized(DEMO_MODEL, "none", progress=watcher)
    assert watcher.seen[-1] == phase
    assert threading.active_count() == threads
    attempt = attempt_behind(caught.value)
    if phase == "resolve":  # nothing had begun
        assert attempt is None
        return
    assert attempt is not None
    assert attempt.where.phase == phase
    assert [each.name for each in attempt.phases] == list(dict.fromkeys(watcher.seen))
    assert attempt.where.bytes_total == (0 if phase in ("plan", "compile", "check") else attempt.where.bytes_total)
    assert (attempt.where.predicted_peak_bytes > 0) == (phase in ("stream", "finish"))


def test_a_load_without_a_plan_is_reported_by_the_layers_that_were_completed() -> None:
    scheme = SchemeFactory(CPU, LoadOptions()).linear("quark_mxfp4")
    assert scheme is not None
    quantized, kept = nn.Module(), nn.Linear(8, 2, bias=False)
    scheme.create_weights(quantized, shards=(("", 4),), in_features=64)
    layers = {
        "up": Assignment("up", "linear", quantized, scheme, ""),
        "head": Assignment("head", "linear", kept, None, "output head"),
    }
    counted = {"up": 512}
    with Recorder(CPU, True, None) as recorder:
        recorder.expect_layers(Expected(600, 1000, 300, 400), layers, counted.__getitem__)
        recorder.on_bytes(600)
        recorder.on_layer("up", new_statistics())
        recorder.on_layer("not of this load", None)
    report = recorder.report("m", "quark_mxfp4", ReadTotals(600, 0.1, 64), 300, tensor_bytes, ranks=(1, 2))

    assert [(layer.name, layer.bytes_in, layer.bytes_out) for layer in report.layers] == [("up", 512, 4 * 32 + 4 * 2)]
    assert [(each.name, each.reason, each.bytes) for each in report.kept] == [("head", "output head", 64)]
    assert (report.rank, report.world_size, report.checkpoint_bytes, report.predicted_peak_bytes) == (1, 2, 1000, 400)
    recorder.on_layer("up", new_statistics())  # a reload, which is not recorded
    assert len(report.layers) == 1
