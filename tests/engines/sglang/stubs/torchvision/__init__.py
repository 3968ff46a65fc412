"""Stands for torchvision, whose wheels on PyPI do not import beside torch's builds for CPUs: SGLang names it only."""

__version__ = "0.0"
