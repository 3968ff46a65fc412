"""Checkpoint formats that quantized weights are written in, and which weight formats each of them can hold."""
