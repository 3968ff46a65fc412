"""What one model predicted, kept on disk for others to be compared with."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ..errors import PolicyError, QuantloadError
from ..memory.amounts import format_bytes

logger = logging.getLogger("quantload")
LEAST = -1e4
"""The logarithm of what is taken to be no probability at all: it is finite in float16."""


class KeptPredictions:
    """Logarithms of probabilities, float16 [positions, vocabulary], in a file that goes when it is closed.

    They are written once, in order, and read in the same order as often as is wanted.
    """

    def __init__(self, file: IO[bytes], positions: int) -> None:
        self._file, self._positions = file, positions
        self._vocabulary = 0

    @classmethod
    @contextmanager
    def of(cls, positions: int) -> Iterator[KeptPredictions]:
        """For so many positions, in the folder for temporary files."""
        with tempfile.TemporaryFile() as file:
            yield cls(file, positions)

    def expect(self, vocabulary: int) -> None:
        """Say how large it becomes. Raises `QuantloadError` where the disk has no room for that."""
        self._vocabulary = vocabulary
        nbytes, place = self._positions * vocabulary * 2, tempfile.gettempdir()
        free = shutil.disk_usage(place).free
        if nbytes > free:
            raise QuantloadError(
                f"the predictions for {self._positions} tokens take {format_bytes(nbytes)} in {place}, which has "
                f"{format_bytes(free)} left: set TMPDIR to a folder with more, or look at fewer tokens (--tokens)"
            )
        logger.info("Eval: the reference's predictions take %s in a temporary file", format_bytes(nbytes))

    def write(self, logs: Tensor) -> None:
        """Append those of some positions."""
        self._file.write(logs.clamp_min(LEAST).half().numpy().tobytes())

    def rewind(self) -> None:
        """Read from the beginning."""
        self._file.seek(0)

    def read(self, logs: Tensor) -> Tensor:
        """Those of the next positions, in float32, to compare as many of another model with.

        Raises `PolicyError` where that has another vocabulary.
        """
        positions, vocabulary = logs.shape
        if vocabulary != self._vocabulary:
            raise PolicyError(f"one predicts {vocabulary} words and the reference {self._vocabulary}")
        data = bytearray(self._file.read(positions * vocabulary * 2))
        kept = torch.from_numpy(np.frombuffer(data, dtype=np.float16)).view(positions, vocabulary)
        return kept.float().log_softmax(-1)
