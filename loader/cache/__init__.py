"""Quantized forms of checkpoints, kept on disk so that the next load reads a quarter of the bytes."""
