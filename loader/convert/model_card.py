"""What a converted checkpoint says to people: a model card made of the source's own, and its license files."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..checkpoint.folder import DOCUMENTS, Checkpoint
from ..checkpoint.paths import locate
from ..memory.amounts import format_bytes
from ..model.skeleton import Assignment
from ..options import QuantizationPolicy

logger = logging.getLogger("quantload")

CARD = "README.md"
LICENSES = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([^/]*)", re.IGNORECASE)
MAX_DOCUMENT_BYTES = 4 << 20
"""The largest card or license that is copied; others are left out with a warning."""

_OWN = ("base_model", "base_model_relation", "quantization", "tags")
_VOID = "model-index"  # measurements of the original, which hold no more
_KEY = re.compile(r"([A-Za-z_][\w.-]*|\"[^\"\n]+\"):(?=\s|$)")
_KINDS = {"linear": "linear layers", "experts": "experts modules", "embedding": "embeddings"}


@dataclass(frozen=True)
class Conversion:
    """What a card says of a conversion: the command, what came out and what reads it."""

    command: str
    scheme: str
    checkpoint_format: str
    modules: str
    read_by: Sequence[str]


def license_files(root: Path) -> list[str]:
    """The names of the license files in a checkpoint folder."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    found = (path for path in root.iterdir() if LICENSES.fullmatch(path.name) and path.suffix not in weights)
    return sorted(path.name for path in found if path.is_file())


def documents(checkpoint: Checkpoint, taken: Iterable[str]) -> list[str]:
    """The model card and the license files that can be copied, but for those that are `taken` already."""
    found = []
    checkpoint.files.gather(DOCUMENTS)
    for name in sorted({CARD, *license_files(checkpoint.root)} - {*taken}):
        path = checkpoint.root / name
        if not path.is_file():
            continue
        locate(checkpoint.root, name)
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            logger.warning("%s is larger than %s and is not copied", name, format_bytes(MAX_DOCUMENT_BYTES))
            continue
        found.append(name)
    checkpoint.files.note(found)
    return found


def base_model(checkpoint: Checkpoint) -> tuple[str, bool]:
    """The hub id a checkpoint was downloaded from, or the name of its folder; and whether it is the first."""
    root = checkpoint.root
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        return root.parent.parent.name.removeprefix("models--").replace("--", "/"), True
    if checkpoint.model_id.startswith("hf://"):
        return checkpoint.model_id.removeprefix("hf://"), True
    name = root.name if checkpoint.elsewhere is None else checkpoint.model_id.rpartition("/")[2]
    return name or checkpoint.model_id, False


def command_line(
    checkpoint: Checkpoint,
    quantization: str,
    checkpoint_format: str,
    policy: QuantizationPolicy | None,
    fit: int | str | None = None,
) -> str:
    """The command that converts so, policies as options; the folder by its name: where it lies is nobody's concern."""
    words = [
        "quantload",
        "convert",
        base_model(checkpoint)[0],
        "OUT",
        "-q",
        quantization,
        "--format",
        checkpoint_format,
    ]
    policy = policy or QuantizationPolicy()
    if fit is not None:
        words[4:6] = ["--fit", f"{fit}B"]
    elif quantization == "auto" and policy.linear != "auto":
        words[5] = policy.linear
    if policy.experts is not None:
        words += ["--experts", policy.experts]
    for pattern in policy.ignore:
        words += ["--ignore", pattern]
    for pattern, scheme in policy.overrides:
        words += ["--override", f"{pattern}={scheme}"]
    if not policy.default_ignore:
        words.append("--no-default-ignore")
    if policy.scale_mode != "default":
        words += ["--scale-mode", policy.scale_mode]
    return shlex.join(words)


def described(assignments: Iterable[Assignment]) -> str:
    """How many modules became what, in a sentence."""
    counted = Counter((each.kind, None if each.scheme is None else each.scheme.name) for each in assignments)
    quantized = [
        f"{count} {_KINDS[kind]} in {scheme}" for (kind, scheme), count in counted.items() if scheme is not None
    ]
    kept = sum(count for (_, scheme), count in counted.items() if scheme is None)
    return f"{' and '.join(quantized)}; modules that are as they were: {kept}."


def model_card(source: str | None, base: str, is_hub_id: bool, said: Conversion) -> str:
    """The card of a checkpoint made of the model `base`: fields and text of `source`, its own, and what was done."""
    fields, body = _front_matter(source or "")
    tags = dict.fromkeys(["quantload", said.scheme, *_listed(fields.get("tags", ""))])
    lines = [
        f"base_model: {json.dumps(base)}",
        "base_model_relation: quantized",
        f"quantization: {json.dumps(said.scheme)}",
        "tags:",
        *(f"- {json.dumps(tag, ensure_ascii=False)}" for tag in tags),
        *(text.rstrip("\n") for key, text in fields.items() if key not in (*_OWN, _VOID)),
    ]
    original = base
    if is_hub_id:
        original = f"[{original}](https://huggingface.co/{original})"
    title = "" if source else f"# {base.rpartition('/')[2]}, quantized\n\n"
    done = (
        f"{title}Made of {original} with quantload {metadata.version('quantload')}, in the format of "
        f"{said.checkpoint_format}:\n\n```\n{said.command}\n```\n\n"
        f"{said.modules} Read by: {', '.join(said.read_by)}.\n"
    )
    rest = f"\nWhat follows is the card of the original, and true of the original.\n\n{body}" if body else ""
    front = "\n".join(lines)
    return f"---\n{front}\n---\n\n{done}{rest}"


def _front_matter(text: str) -> tuple[dict[str, str], str]:
    """The fields of a card by name, each with its own lines as they are, and the text behind them.

    No YAML is evaluated: the file may be anybody's. What does not look like plain fields is a part of the text.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    match = re.match(r"---[ \t]*\n(.*?)(?:^---[ \t]*$\n?)", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, text.lstrip("\n")
    fields: dict[str, str] = {}
    key = None
    for line in match[1].splitlines(keepends=True):
        found = _KEY.match(line)
        if found is not None:
            key = found[1].strip('"')
            if key in fields:
                return {}, text
            fields[key] = line
        elif key is not None and (line.strip() == "" or line[0] in " \t-#"):
            fields[key] += line
        elif line.strip() and line[0] != "#":
            return {}, text
    return fields, text[match.end() :].lstrip("\n")


def _listed(field: str) -> Iterator[str]:
    """The values of a list of words, in either form that YAML has for it."""
    _, _, value = field.partition(":")
    inner = value.strip()
    in_line = inner.startswith("[") and inner.endswith("]")
    words = inner[1:-1].split(",") if in_line else re.split(r"^[ \t]*-[ \t]+|\n", value, flags=re.MULTILINE)
    for word in words:
        found = word.strip().strip("\"'")
        if found and not found.startswith("#"):
            yield found
