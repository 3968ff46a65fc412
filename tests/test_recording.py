"""What a load that somebody else drives writes down: no plan, layers as they come, one report a rank."""

from __future__ import annotations

import torch
from quantload.checkpoint.reader import ReadTotals
from quantload.kernels.statistics import new_statistics
from quantload.model.skeleton import Assignment
from quantload.options import LoadOptions
from quantload.recording import Expected, Recorder, tensor_bytes
from quantload.schemes.registry import SchemeFactory
from torch import nn

CPU = torch.device("cpu")


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
