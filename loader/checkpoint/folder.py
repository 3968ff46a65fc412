"""A checkpoint, and the folder here that has it: what can be known before torch is imported, with nobody asked."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..addresses import scheme_of
from ..errors import ModelNotFoundError
from ..local_paths import local_path
from .files import CheckpointFiles, FolderFiles
from .other_kinds import file_error, reference_error
from .quantization_config import FILES as QUANTIZATION_FILES
from .quantization_config import with_quantization_config
from .small_files import read_json_object, read_small_file
from .weight_map import INDEX_NAME, MAX_INDEX_BYTES, SINGLE_NAME, explicit_name, parse_weight_map

# Everything transformers reads beside the weights. Never pickles.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.codes", "*.tokenizer", "*.py")
"""What lies beside the weights, by name: configs, code, and the vocabularies of all tokenizers of transformers."""
DOCUMENTS = (
    "README.md",
    *(
        f"{name}*"
        for word in ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
        for name in (word, word.title(), word.lower())
    ),
)
"""What is for people: the model card, and the terms that the weights come under."""
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
CONFIGS = (CONFIG_NAME, *QUANTIZATION_FILES, GENERATION_CONFIG_NAME)
"""What says which model it is."""
logger = logging.getLogger("quantload")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with a checkpoint, and the name the user gave for it."""

    root: Path
    model_id: str
    elsewhere: CheckpointFiles | None = field(default=None, repr=False, compare=False)
    """Where its files are, if not in `root`, which then has no weights."""
    files: CheckpointFiles = field(init=False, repr=False, compare=False)
    """Its files, and what they were when they were first looked at, by all who read it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", self.elsewhere or FolderFiles(self.root))

    def note_configs(self) -> None:
        """Remember what the files are that say which model it is, before transformers reads them."""
        self.files.note(CONFIGS)

    def note_small_files(self) -> None:
        """Remember what else lies beside the weights, such as the files of a tokenizer."""
        self.files.gather(SMALL_FILES)
        names = {path.name for pattern in SMALL_FILES for path in self.root.glob(pattern) if path.is_file()}
        self.files.note(sorted(names))

    def note_code(self) -> None:
        """Remember what the modeling code is."""
        self.files.gather(("*.py",))
        self.files.note(sorted(path.name for path in self.root.glob("*.py")))

    @property
    def commit(self) -> str | None:
        """The commit of a checkpoint that the hub's client downloaded, which names its folder; None for others."""
        return self.root.name if self.root.parent.name == "snapshots" else None

    @property
    def is_quantized(self) -> bool:
        """Whether its config says that weights are stored quantized."""
        return self.config().get("quantization_config") is not None

    def config(self) -> dict[str, Any]:
        """`config.json` as a dict; raises `CheckpointError` when it is missing or no JSON object.

        What it says about quantization is its `quantization_config`, wherever a tool wrote it.
        """
        config = read_json_object(self.root / CONFIG_NAME)
        if config is None:
            raise self.files.no_model(has_config=False)
        return with_quantization_config(self.root, config, read_json_object)


def resolve_folder(model_id: str | Path, revision: str | None = None) -> Checkpoint | None:
    """The checkpoint in a folder here, with nobody asked; None for a URL and for what may be a hub id.

    Raises `ModelNotFoundError` for what is none of these, `UnsupportedCheckpointError` for files of other kinds.
    """
    given = str(model_id)
    problem = reference_error(given, revision)
    if problem is not None:
        raise problem
    if scheme_of(given) is not None:
        return None
    if not given:
        raise ModelNotFoundError("the model is empty (''); give a folder or a hub id such as 'Qwen/Qwen3-0.6B'")
    folder = local_path(given, "the model", ModelNotFoundError)
    if folder.is_dir():
        if revision is not None:
            logger.warning("%s is a folder, which has no revisions: %r is not looked at", folder, revision)
        # Without links, so that one that is turned to another version meanwhile does not mix the two.
        return Checkpoint(folder.resolve(), given)
    if folder.exists():
        raise file_error(folder)
    if folder.is_symlink():
        raise ModelNotFoundError(f"{given!r} is a link that leads nowhere; give the folder itself")
    if isinstance(model_id, Path) or _looks_local(given):
        raise ModelNotFoundError(
            f"{given!r} is no folder here; check the path, or give a hub id such as 'Qwen/Qwen3-0.6B'"
        )
    return None


def _looks_local(given: str) -> bool:
    return given.startswith((".", "/", "~")) or given.endswith("/") or "\\" in given or given.count("/") > 1


def shard_names(root: Path) -> list[str]:
    """The files with the weights of the checkpoint in a folder, by its config or its index; they need not be there."""
    name = explicit_name(Checkpoint(root, str(root)).config()) or INDEX_NAME
    if not name.endswith(".json"):
        return [name]
    index = read_small_file(root / name, MAX_INDEX_BYTES)
    return [SINGLE_NAME] if index is None else sorted(set(parse_weight_map(index, name).values()))
