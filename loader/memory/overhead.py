"""What the Python objects of very many tensors and pieces take beyond the allowance for everything else."""

from __future__ import annotations

from typing import NamedTuple


class Objects(NamedTuple):
    """Objects of one kind: the allowance covers `covered` of them, each further one takes at most `nbytes`."""

    covered: int
    nbytes: int

    def beyond(self, count: int) -> int:
        """Bytes that `count` of them take beyond the allowance."""
        return max(count - self.covered, 0) * self.nbytes


# Measured with headers of up to 185,883 small tensors and with up to 148,649 pieces, and rounded up.
TENSORS = Objects(32768, 1024)
"""Tensors of a checkpoint, with their routes; 0.7 to 0.8 KiB each."""
PIECES = Objects(16384, 1280)
"""Planned pieces, with the closures around them; of huge checkpoints, and of tiny chunks."""
CONFIG_VALUES = Objects(32768, 1024)
"""Values in config.json: what transformers makes of each; 0.85 KiB for fields of their own."""
READ_AT_ONCE = Objects(1 << 24, 3)
"""Bytes of the largest header or index, which are read whole; up to 2.9 bytes each where they are one long text."""
WRITTEN_PIECES = Objects(16384, 1792)
"""Planned pieces of a conversion, with the extents of what is written for them; 1.5 to 1.6 KiB each."""
WRITTEN_TENSORS = Objects(16384, 1536)
"""Tensors that a conversion writes, with plans, headers and closures; 3.4 KiB a weight of two, 4.3 KiB of three."""
