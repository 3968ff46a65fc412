"""What `load_quantized` says of tokens that an engine chose: for each its log-probability, and that of the likeliest.

In a process of its own, as SGLang changes transformers where both are imported. Its argument is JSON: `model`,
`scheme`, `ignore`, `prompts` and `chosen`, token ids for each.
"""

from __future__ import annotations

import json
import sys

import torch
from quantload import QuantizationPolicy, load_quantized


def main() -> None:
    """Print JSON behind `RESULT`: for each prompt and token [own, likeliest]."""
    asked = json.loads(sys.argv[1])
    policy = QuantizationPolicy(ignore=tuple(asked["ignore"]))
    model = load_quantized(asked["model"], asked["scheme"], policy=policy)
    found = []
    for prompt, chosen in zip(asked["prompts"], asked["chosen"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *chosen]])).logits[0, len(prompt) - 1 : -1]
        each = logits.float().log_softmax(-1)
        found.append([[float(row[token]), float(row.max())] for row, token in zip(each, chosen, strict=True)])
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()
