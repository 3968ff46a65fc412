"""One rank of a test: loads its part of a model, computes with the others, and writes down what it found.

The arguments are the rank, how many there are, a file to meet at, a file to write, and a JSON object with `path`,
`scheme`, `expert_parallel`, a prompt (`ids`), other weights to be given to the model (`reloads`), and what is to go
wrong (`fails`: on the second rank).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from quantload import LoadOptions, QuantloadError, load_quantized, reload_weights

DIES_AFTER = 2 << 20


def _go_wrong(done: int, total: int) -> None:
    """What the progress of a load that is to fail calls."""
    if wrong == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError("this rank was told to fail")


def _load(said: dict[str, Any], rank: int) -> Any:
    return load_quantized(
        said["path"],
        said["scheme"],
        options=LoadOptions(workers=2, chunk_bytes=said.get("chunk", 8 << 20)),
        progress=_go_wrong if wrong is not None and rank == 1 else False,
        tp="auto",
        expert_parallel=said.get("expert_parallel", False),
    )


def main() -> dict[str, Any]:
    rank, ranks = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    try:
        model = _load(said, rank)
    except QuantloadError as error:
        return {"error": type(error).__name__, "message": str(error)}
    for path in said.get("reloads", ()):
        with contextlib.suppress(QuantloadError):  # the first of them may be damaged
            reload_weights(model, path, progress=False)
    ids = torch.tensor(said["ids"])
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=said["tokens"], do_sample=False, eos_token_id=None, pad_token_id=0)
        logits = model(ids).logits
    dist.barrier()
    dist.destroy_process_group()
    return {"tokens": made.tolist(), "logits": logits.float().tolist(), "report": model.load_report.to_dict()}


if __name__ == "__main__":
    said = json.loads(sys.argv[5])
    wrong = said.get("fails")
    found = main()
    with open(sys.argv[4], "w") as file:
        json.dump(found, file)
