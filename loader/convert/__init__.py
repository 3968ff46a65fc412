"""Write a quantized checkpoint: `flow.py` is the whole of it, from top to bottom."""
