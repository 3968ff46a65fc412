"""Train the bundled demo model: a small Qwen3-MoE on Python's standard library.

The text is the standard library of the running interpreter, so the script needs
no download.  It writes a complete checkpoint folder (BF16 safetensors in two
shards, config, tokenizer, model card) and the held-out text that perplexity is
measured on.

    python bench/train_demo.py --minutes 60           # tied to a time budget
    python bench/train_demo.py --steps 5000 --seed 0  # tied to a step count
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = ("textwrap.py", "csv.py", "cmd.py", "sched.py", "string.py")
VALIDATION_BYTES = 65536
SKIP_FOLDERS = frozenset(
    {
        "__pycache__",
        "__phello__",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
SKIP_FILES = frozenset({"html/entities.py", "stringprep.py"})
SKIP_PREFIXES = ("_sysconfigdata", "config-")
VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CONTEXT = 1024
TOKENS_PER_STEP = 2048
# (share of the run, sequence length): the long contexts come last.
STAGES = ((0.70, 256), (0.90, 512), (1.00, 1024))
WARMUP, STABLE = 0.01, 0.30
MUON_RATE, ADAM_RATE = 0.02, 0.003
WEIGHT_DECAY = 0.1
SAMPLE_PROMPT = 'def read_json(path):\n    """Return the object stored in the JSON file at path."""\n'
SIZE_LIMIT = 16_000_000


# --- text -----------------------------------------------------------------


@dataclass
class Corpus:
    """Training documents and the held-out text."""

    documents: list[str] = field(default_factory=list)
    training_bytes: int = 0
    validation: str = ""


def is_training_file(relative: Path) -> bool:
    """Tell whether a standard library file belongs to the training text."""
    if SKIP_FOLDERS.intersection(relative.parts[:-1]):
        return False
    if any(part.startswith(SKIP_PREFIXES) for part in relative.parts):
        return False
    name = relative.as_posix()
    return name not in SKIP_FILES and name not in HELD_OUT


def collect_corpus(library: Path) -> Corpus:
    """Read the standard library, leaving out the held-out modules."""
    corpus = Corpus()
    for path in sorted(library.rglob("*.py")):
        if not is_training_file(path.relative_to(library)):
            continue
        data = path.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            corpus.documents.append(text)
            corpus.training_bytes += len(data)
    held_out = b"".join((library / name).read_bytes() for name in HELD_OUT)
    corpus.validation = held_out[:VALIDATION_BYTES].decode("utf-8")
    return corpus


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """Return all documents as one row of token ids, each led by end-of-text."""
    end = int(tokenizer.convert_tokens_to_ids(END_OF_TEXT))
    backend = tokenizer.backend_tokenizer
    ids: list[int] = []
    for encoding in backend.encode_batch(documents):
        ids.append(end)
        ids.extend(encoding.ids)
    ids.append(end)
    return torch.tensor(ids, dtype=torch.long)


class Batches:
    """Shuffled passes over the token row, cut anew at a random offset each pass."""

    def __init__(self, ids: Tensor, seed: int) -> None:
        self.ids = ids
        self.generator = torch.Generator().manual_seed(seed)
        self.length = 0
        self.rows: Iterator[Tensor] = iter(())

    def _one_pass(self, length: int) -> Iterator[Tensor]:
        offset = int(torch.randint(length, (1,), generator=self.generator))
        count = (len(self.ids) - offset) // length
        grid = self.ids[offset : offset + count * length].view(count, length)
        order = torch.randperm(count, generator=self.generator)
        size = TOKENS_PER_STEP // length
        for start in range(0, count - size + 1, size):
            yield grid[order[start : start + size]]

    def take(self, length: int) -> Tensor:
        """Return the next batch of rows of `length` tokens."""
        if length != self.length:
            self.length, self.rows = length, self._one_pass(length)
        batch = next(self.rows, None)
        while batch is None:
            self.rows = self._one_pass(length)
            batch = next(self.rows, None)
        return batch


# --- model ----------------------------------------------------------------


class Reorder(torch.autograd.Function):
    """Permute rows; the gradient is a gather too, not a slow scatter-add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Gather the rows in the given order."""
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gather the gradient back."""
        (inverse,) = ctx.saved_tensors
        return gradients[0][inverse], None, None


def reorder(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Typed call of `Reorder`."""
    result: Tensor = Reorder.apply(rows, order, inverse)  # type: ignore[no-untyped-call]
    return result


def sorted_experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Run each expert once over its own rows (same result as the stock loop)."""
    tokens, top_k = chosen.shape
    hidden = hidden.to(torch.bfloat16)
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    counts: list[int] = torch.bincount(flat, minlength=experts.num_experts).tolist()
    copies = hidden.unsqueeze(1).expand(tokens, top_k, -1).reshape(tokens * top_k, -1)
    outputs = []
    for index, rows in enumerate(torch.split(reorder(copies, order, inverse), counts)):
        gate, up = functional.linear(rows, experts.gate_up_proj[index]).chunk(2, dim=-1)
        inner = functional.silu(gate) * up
        outputs.append(functional.linear(inner, experts.down_proj[index]))
    merged = reorder(torch.cat(outputs), inverse, order).view(tokens, top_k, -1)
    return (merged * weights.to(merged.dtype).unsqueeze(-1)).sum(dim=1)


def build_model(end_of_text: int) -> Qwen3MoeForCausalLM:
    """Return the untrained model in FP32, every layer sparse."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.005,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    config._experts_implementation = "sorted"
    return Qwen3MoeForCausalLM(config)


# --- optimizer ------------------------------------------------------------


def orthogonalize(stack: Tensor) -> Tensor:
    """Newton-Schulz iteration: bring the singular values of each matrix near 1."""
    work = stack.to(torch.bfloat16)
    work = work / (work.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = work @ work.mT
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        work = torch.baddbmm(work, poly, work, beta=3.4445)
    return work.to(stack.dtype)


class Muon:
    """Momentum with orthogonalized updates, for the matrices inside the layers.

    Every parameter is seen as a stack of matrices, laid so that the short side
    comes first; stacks of the same shape go through one batched iteration.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self.groups: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor, int]]] = {}
        for name, parameter in named:
            parts = 2 if name.endswith("gate_up_proj") else 1
            rows, columns = parameter.shape[-2] // parts, parameter.shape[-1]
            key = (min(rows, columns), max(rows, columns))
            state = (parameter, torch.zeros_like(parameter), parts)
            self.groups.setdefault(key, []).append(state)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Apply one update at the given learning rate."""
        for key, states in self.groups.items():
            directions = [self._direction(state, key) for state in states]
            updates = orthogonalize(torch.cat(directions))
            sizes = [len(direction) for direction in directions]
            for state, update in zip(states, torch.split(updates, sizes), strict=True):
                self._apply(state, update, rate)

    @staticmethod
    def _direction(state: tuple[nn.Parameter, Tensor, int], key: tuple[int, int]) -> Tensor:
        parameter, momentum, parts = state
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        momentum.lerp_(gradient, 0.05)
        nesterov = gradient.lerp(momentum, 0.95)
        rows, columns = parameter.shape[-2] // parts, parameter.shape[-1]
        stack = nesterov.reshape(-1, rows, columns)
        return stack if rows == key[0] else stack.mT

    @staticmethod
    def _apply(state: tuple[nn.Parameter, Tensor, int], update: Tensor, rate: float) -> None:
        parameter, _, parts = state
        rows, columns = parameter.shape[-2] // parts, parameter.shape[-1]
        update = update if update.shape[-2] == rows else update.mT
        parameter.mul_(1 - rate * WEIGHT_DECAY)
        scale = max(1.0, rows / columns) ** 0.5
        parameter.add_(update.reshape(parameter.shape), alpha=-rate * scale)


def split_parameters(model: nn.Module) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for attention and expert matrices, AdamW for everything else."""
    matrices: list[tuple[str, nn.Parameter]] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = ".layers." in name and parameter.dim() >= 2
        if inside and not name.endswith("mlp.gate.weight"):
            matrices.append((name, parameter))
        else:
            others.append(parameter)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return Muon(matrices), adam


# --- training -------------------------------------------------------------


@dataclass
class Schedule:
    """Progress of the run, by steps if given, else by time."""

    steps: int | None
    seconds: float
    start: float = field(default_factory=time.monotonic)

    def progress(self, step: int) -> float:
        """Return the finished share of the run."""
        if self.steps is not None:
            return step / self.steps
        return (time.monotonic() - self.start) / self.seconds


def rate_factor(progress: float) -> float:
    """Warm up, hold, then fall linearly to zero."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.02)
    return min(1.0, max(0.0, (1 - progress) / (1 - STABLE)))


@dataclass
class Outcome:
    """What a training run reports to the model card."""

    steps: int
    seconds: float
    loss: float
    training_tokens: int


def sequence_length(progress: float) -> int:
    """Return the sequence length at this point of the run."""
    return next((length for end, length in STAGES if progress < end), CONTEXT)


def training_loss(model: Qwen3MoeForCausalLM, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss with the router's balance term, plain cross-entropy)."""
    # On a CPU the plain matrix products win for short rows, the fused kernel for long ones.
    model.set_attn_implementation("eager" if rows.shape[1] <= 256 else "sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=rows, labels=rows, output_router_logits=True, use_cache=False)
    balance = model.config.router_aux_loss_coef * output.aux_loss
    return output.loss, (output.loss - balance).detach()


def train(
    model: Qwen3MoeForCausalLM,
    ids: Tensor,
    schedule: Schedule,
    seed: int,
    checkpoints: Path | None,
) -> Outcome:
    """Train until the schedule ends; the loss is averaged over the last steps."""
    muon, adam = split_parameters(model)
    batches = Batches(ids, seed)
    step, average, saved = 0, math.nan, schedule.start
    model.train()
    while (progress := schedule.progress(step)) < 1:
        factor = rate_factor(progress)
        loss, plain = training_loss(model, batches.take(sequence_length(progress)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(MUON_RATE * factor)
        adam.param_groups[0]["lr"] = ADAM_RATE * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        value = float(plain)
        average = value if math.isnan(average) else 0.98 * average + 0.02 * value
        now = time.monotonic()
        if step % 20 == 0:
            print(f"{now - schedule.start:7.1f}s {progress:6.1%} step {step} loss {average:.4f}", flush=True)
        if checkpoints is not None and now - saved > 300:
            saved = now
            model.save_pretrained(checkpoints)
    return Outcome(step, time.monotonic() - schedule.start, average, step * TOKENS_PER_STEP)


# --- results --------------------------------------------------------------


@torch.no_grad()
def validation_loss(model: Any, ids: Tensor, window: int, stride: int) -> tuple[float, int]:
    """Return (summed negative log-likelihood in nats, tokens scored).

    Windows of `window` tokens start every `stride` tokens.  Each token is scored
    once, in the first window that holds it; the very first token never is.
    """
    total, scored, done = 0.0, 0, 1
    for start in range(0, len(ids) - 1, stride):
        rows = ids[start : start + window]
        logits = model(input_ids=rows.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        losses = functional.cross_entropy(logits, rows[1:], reduction="none")
        # losses[k] belongs to token start + k + 1
        fresh = losses[max(done - start - 1, 0) :]
        total += float(fresh.double().sum())
        scored += len(fresh)
        done = start + len(rows)
        if done >= len(ids):
            break
    return total, scored


def use_common_names(folder: Path) -> None:
    """Give the settings the names that published Qwen3-MoE folders use."""
    config_path, tokenizer_path = folder / "config.json", folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    config_path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    tokenizer = json.loads(tokenizer_path.read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer_path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)


def save_checkpoint(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Write the BF16 checkpoint and the tokenizer; return the weights' size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    model.to(torch.bfloat16)
    end = model.config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder, max_shard_size="9MB")
    tokenizer.save_pretrained(folder)
    use_common_names(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(folder: Path, validation: str) -> dict[str, Any]:
    """Load the saved folder in BF16 and measure it on the held-out text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text_ids = tokenizer(validation, return_tensors="pt", verbose=False)["input_ids"][0]
    led = torch.cat([torch.tensor([model.config.eos_token_id]), text_ids])
    sliding, sliding_count = validation_loss(model, led, 512, 256)
    separate, separate_count = validation_loss(model, text_ids, 512, 512)
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=96, do_sample=False)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sliding": math.exp(sliding / sliding_count),
        "sliding_tokens": sliding_count,
        "bits_per_byte": sliding / math.log(2) / len(validation.encode()),
        "separate": math.exp(separate / separate_count),
        "separate_tokens": separate_count,
        "sample": tokenizer.decode(generated[0], skip_special_tokens=True),
    }


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- qwen3_moe
- code
---

# quantload demo model

A very small Qwen3-MoE language model of Python source code. It exists so that
`quantload` can be tried and tested on a real mixture-of-experts checkpoint, with
per-expert tensors in two shards, without downloading anything. It is a test
object, not a coding assistant.

## Architecture

`Qwen3MoeForCausalLM`: {parameters:,} parameters, hidden size 256, 7 layers (all
sparse), 4 attention heads of 64 with 2 key/value heads, 8 experts of width 128
with 2 active per token, tied embeddings, byte-level BPE vocabulary of 4096,
context of 1024 tokens. BF16, {size:,} bytes of safetensors in two shards.

## Data

The standard library of CPython {python}: {documents} files, {training_bytes:,} bytes,
{unique_tokens:,} tokens. Left out: the test suites, `idlelib`, `lib2to3`, `turtledemo`,
`encodings`, `pydoc_data`, generated tables and third-party packages, and the
held-out modules {held_out}, whose
first {validation_bytes:,} bytes (in this order) are `tests/data/stdlib_validation.txt`.

## Training

`bench/train_demo.py --steps {steps} --seed {seed}`; {mode}.

| | |
| --- | --- |
| date | {date} |
| machine | {cores} CPU cores, no GPU; torch {torch} |
| wall time | {minutes:.1f} minutes |
| steps | {steps:,} of {step_tokens:,} tokens |
| tokens seen | {seen:,} ({passes:.1f} passes over the data) |
| final training loss | {loss:.3f} nats per token (moving average) |

Muon for the attention and expert matrices, AdamW for the rest; sequence lengths
256, 512 and 1024 (the last two in the last 30 % and 10 % of the run).

## Quality on the held-out text

Measured on the saved BF16 weights with transformers {transformers} on a CPU, on all of
`tests/data/stdlib_validation.txt`:

| method | tokens scored | perplexity per token |
| --- | --- | --- |
| windows of 512 tokens every 256 after end-of-text, each token once | {sliding_tokens:,} | **{sliding:.3f}** |
| separate windows of 512 tokens, first token of each not scored | {separate_tokens:,} | {separate:.3f} |

The first line is {bits_per_byte:.4f} bits per byte.

Greedy continuation of the first two lines by 96 tokens:

```python
{sample}
```

## Limits

- It imitates the style of the standard library; what it writes is usually not
  correct and often does not run.
- It was trained briefly on little text (see the table), repeats itself when
  decoded greedily, and can reproduce passages of its training text verbatim.
- It knows no dialogue and little natural language beyond docstrings. The chat
  template only joins the contents of the messages, and the model continues them
  as code.
- The perplexity is comparable only with numbers for the same tokenizer and text.

## Licence

The weights are released under Apache-2.0. The training text and
`tests/data/stdlib_validation.txt` are parts of CPython, copyright the Python
Software Foundation, under the PSF License Agreement (PSF-2.0).
"""


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write the model card."""
    (folder / "README.md").write_text(CARD.format(**facts), encoding="utf-8")


def card_facts(corpus: Corpus, ids: Tensor, outcome: Outcome, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the model card says about the data and the run."""
    by_time = "the schedule followed a time budget, so a run by steps comes close but is not equal"
    return {
        "size": size,
        "python": platform.python_version(),
        "documents": len(corpus.documents),
        "training_bytes": corpus.training_bytes,
        "unique_tokens": len(ids),
        "held_out": ", ".join(f"`{name}`" for name in HELD_OUT),
        "validation_bytes": VALIDATION_BYTES,
        "seed": options.seed,
        "mode": by_time if options.steps is None else "the schedule followed the step count",
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "minutes": outcome.seconds / 60,
        "steps": outcome.steps,
        "step_tokens": TOKENS_PER_STEP,
        "seen": outcome.training_tokens,
        "passes": outcome.training_tokens / len(ids),
        "loss": outcome.loss,
    }


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="train for this many steps")
    length.add_argument("--minutes", type=float, default=60.0, help="train for this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "loader" / "demo_model")
    parser.add_argument("--validation", type=Path, default=ROOT / "tests" / "data" / "stdlib_validation.txt")
    parser.add_argument("--checkpoints", type=Path, help="save here every five minutes")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.minutes <= 0:
        parser.error("--minutes must be above 0")
    return options


def main() -> int:
    """Train, save, measure and describe the demo model."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    corpus = collect_corpus(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(corpus.documents)
    ids = encode_documents(tokenizer, corpus.documents)
    print(f"{len(corpus.documents)} files, {corpus.training_bytes} bytes, {len(ids)} tokens")
    options.validation.parent.mkdir(parents=True, exist_ok=True)
    options.validation.write_text(corpus.validation, encoding="utf-8", newline="")
    model = build_model(int(tokenizer.convert_tokens_to_ids(END_OF_TEXT)))
    schedule = Schedule(options.steps, options.minutes * 60)
    outcome = train(model, ids, schedule, options.seed, options.checkpoints)
    size = save_checkpoint(model, tokenizer, options.output)
    if size >= SIZE_LIMIT:
        print(f"the weights take {size} bytes, {SIZE_LIMIT} is the limit", file=sys.stderr)
        return 1
    facts = card_facts(corpus, ids, outcome, size, options)
    facts.update(measure(options.output, corpus.validation))
    write_card(options.output, facts)
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
