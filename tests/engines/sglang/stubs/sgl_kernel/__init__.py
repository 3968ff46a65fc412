"""Stands for SGLang's kernels, which exist for GPUs only: nothing of them is called on a CPU without AMX."""

from absent import absent

__version__ = "0.4.10"
__getattr__ = absent(__name__)
