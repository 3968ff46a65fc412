"""Fixtures every folder of tests may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported: no test may reach the network

import architectures
import pytest
from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny checkpoint of an architecture, built when first asked for. Tests must not write to it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            architectures.save(architectures.BY_NAME[name], path)
        return path

    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the checkpoints written by the reference tools."""
    return DATA / "golden"
