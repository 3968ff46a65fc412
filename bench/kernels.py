"""How fast the kernels for GPUs are, on the CUDA or ROCm GPU at hand; where there is none, says so and ends.

- quantize: every format, pieces of 8 and of 256 MiB, against the device's copy of the same pieces;
- linear: `linear` of every kernel that can run, 1 to 512 tokens, against BF16 `torch.nn.functional.linear`;
- experts: the grouped kernels against a loop of BF16 products;
- load: a whole load onto the device from a warm page cache, against a plain pinned copy of the same bytes, and the
  device's memory.

    python bench/kernels.py
    python bench/kernels.py --quick
    python bench/kernels.py --parts quantize load            # each table is of the newest run that has it
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Measure what the command line asks for; 1 when a kernel failed or was wrong."""
    from gpu_command import run

    return run()


def give_way() -> None:
    """Let Hugging Face's package `kernels`, where it is installed, have this module's place.

    The scripts of this folder have it first on their path, and transformers imports that package where it can.
    """
    here = Path(__file__).resolve().parent
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("kernels", elsewhere)
    if spec is None or spec.loader is None or spec.origin is None:  # nothing, or a folder that is no package
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)


if __name__ == "kernels":
    give_way()
elif __name__ == "__main__":
    sys.exit(main())
