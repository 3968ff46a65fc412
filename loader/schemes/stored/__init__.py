"""Checkpoints that hold codes and scales already: what their config says, and how the tensors lie."""
