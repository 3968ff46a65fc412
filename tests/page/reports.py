"""Reports to be shown: as JSON, made up, of any number of layers."""

from __future__ import annotations

from typing import Any

from quantload.memory.report import KeptReport, LayerReport, LoadReport, PhaseReport, TimelinePoint

GIB = 1 << 30
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.experts")


def layer(name: str, sqnr: float | None = 19.0, scheme: str = "quark_mxfp4", **more: Any) -> LayerReport:
    kind = "experts" if name.endswith("experts") else "linear"
    plain: dict[str, Any] = {"name": name, "kind": kind, "scheme": scheme, "kernel": "numba", "numel": 1 << 20}
    plain |= {"bytes_in": 2 << 20, "bytes_out": 17 << 15, "sqnr_db": sqnr, "max_abs_error": 0.0625, "amax": 0.5}
    return LayerReport(**{**plain, "saturated_fraction": 0.01, "zero_fraction": 0.1, **more})


def plain_layers(depth: int) -> list[LayerReport]:
    """Layers of a mixture of experts, whose errors differ a little."""
    return [
        layer(f"model.layers.{d}.{module}", 19.0 + (7 * d + 3 * i) % 11 / 10)
        for d in range(depth)
        for i, module in enumerate(MODULES)
    ]


def layers_with_single_experts(number: int) -> list[LayerReport]:
    """As many layers as that, nearly all of them experts on their own."""
    return [
        layer(f"model.layers.{i // 600}.mlp.experts.{i % 200}.{('gate', 'up', 'down')[i // 200 % 3]}_proj", 18 + i % 3)
        for i in range(number)
    ]


def report(layers: list[LayerReport] | None = None, **more: Any) -> dict[str, Any]:
    layers = plain_layers(48) if layers is None else layers
    final = sum(each.bytes_out for each in layers) + GIB
    points = [TimelinePoint(0.2 * i, i * final // 50, i * final // 50) for i in range(51)]
    made = LoadReport(
        model="org/model", quantization="quark_mxfp4", device="cpu", seconds=10.0,
        bytes_read=sum(each.bytes_in for each in layers) + GIB,
        checkpoint_bytes=sum(each.bytes_in for each in layers) + GIB, final_bytes=final, peak_bytes=final + (40 << 20),
        staging_peak_bytes=32 << 20, baseline_bytes=300 << 20, predicted_final_bytes=final,
        predicted_peak_bytes=final + (96 << 20), layers=layers, kept=[KeptReport("lm_head", "output head", 128 << 20)],
        timeline=points, phases=[PhaseReport("plan", 1.0), PhaseReport("stream", 9.0)], versions={"torch": "2.13.0"},
    )  # fmt: skip
    return {**made.to_dict(), **more}
