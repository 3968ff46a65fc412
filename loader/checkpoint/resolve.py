"""From what the user gave (folder or hub id) to a local folder with the checkpoint's files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CheckpointError, QuantloadError
from ..local_paths import local_path
from .files import CheckpointFiles, FolderFiles
from .other_kinds import file_error, names_error, reference_error
from .quantization_config import FILES as QUANTIZATION_FILES
from .quantization_config import with_quantization_config
from .remote.opening import open_remote
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


def resolve(model_id: str | Path | Checkpoint, revision: str | None = None) -> Checkpoint:
    """The checkpoint a folder or hub id stands for; a hub id is downloaded, or taken from the cache when offline.

    One that was resolved before is itself: what it was then counts, whatever its name stands for now.

    Only safetensors weights and small text files are downloaded. A URL stands for itself: its weights are read where
    they are, and its small files are in a folder of the checkpoint that `files.close` removes. Raises `CheckpointError`
    when there is no such folder or repository, `UnsupportedCheckpointError` for URLs and files of other kinds.
    """
    if isinstance(model_id, Checkpoint):
        return model_id
    given = str(model_id)
    problem = reference_error(given, revision)
    if problem is not None:
        raise problem
    remote = open_remote(given, revision)
    if remote is not None:
        remote.gather(CONFIGS)
        return Checkpoint(remote.root, remote.shown, remote)
    if not given:
        raise CheckpointError("the model is empty (''); give a folder or a hub id such as 'Qwen/Qwen3-0.6B'")
    folder = local_path(given, "the model", CheckpointError)
    if folder.is_dir():
        if revision is not None:
            logger.warning("%s is a folder, which has no revisions: %r is not looked at", folder, revision)
        # Without links, so that one that is turned to another version meanwhile does not mix the two.
        return Checkpoint(folder.resolve(), given)
    if folder.exists():
        raise file_error(folder)
    if folder.is_symlink():
        raise CheckpointError(f"{given!r} is a link that leads nowhere; give the folder itself")
    if isinstance(model_id, Path) or _looks_local(given):
        raise CheckpointError(
            f"{given!r} is no folder here; check the path, or give a hub id such as 'Qwen/Qwen3-0.6B'"
        )
    return Checkpoint(_download(given, revision), given)


@contextmanager
def resolved(model_id: str | Path | Checkpoint, revision: str | None = None) -> Iterator[Checkpoint]:
    """`resolve`; what it took of this disk for a checkpoint that is elsewhere is given back in the end.

    Not if `model_id` was resolved before: then it belongs to who did that.
    """
    checkpoint = resolve(model_id, revision)
    try:
        yield checkpoint
    finally:
        if checkpoint is not model_id:
            checkpoint.files.close()


def _looks_local(given: str) -> bool:
    return given.startswith((".", "/", "~")) or given.endswith("/") or "\\" in given or given.count("/") > 1


def _download(repo: str, revision: str | None) -> Path:
    """Fetches the small files, then exactly the shards they call for, of the same commit."""
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=[*SMALL_FILES, *DOCUMENTS]))
        if not (root / CONFIG_NAME).exists():
            raise _no_model(repo, root, has_config=False)
        shards = shard_names(root)
        if not all((root / shard).exists() for shard in shards):
            root = Path(snapshot_download(repo, revision=root.name, allow_patterns=shards))
        if not any((root / shard).exists() for shard in shards):
            raise _no_model(repo, root, has_config=True)
        return root
    except HFValidationError:
        raise CheckpointError(f"{repo!r} is neither a folder here nor a valid hub id (owner/name)") from None
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo!r} is gated; accept its licence on the hub, then run 'hf auth login' or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo!r} has no revision {revision!r}; name a branch, a tag or a commit") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo!r} is neither a folder here nor a repository on the hub; check the spelling, "
            "or log in with 'hf auth login' if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo!r} is no folder here, not in the hub cache, and the hub cannot be reached; "
            f"connect once and run 'hf download {repo}', unset HF_HUB_OFFLINE, or give a folder"
        ) from error
    except QuantloadError:
        raise
    except Exception as error:  # its releases raise the errors of different network libraries
        raise CheckpointError(f"{repo!r} could not be downloaded: {error}; try again or give a folder") from error


def _no_model(repo: str, root: Path, *, has_config: bool) -> QuantloadError:
    """The error for a repository without a model, by the names of all its files where the hub says them."""
    try:
        names = HfApi().list_repo_files(repo, revision=root.name)
    except Exception:  # offline, of whatever library: what is there is all there is to go by
        names = [path.name for path in root.iterdir()]
    lacking = "weights in safetensors" if has_config else "config.json"
    return names_error(
        repr(repo), [name for name in names if "/" not in name], has_config=has_config
    ) or CheckpointError(f"{repo!r} has no {lacking}; give the hub id of a transformers model")


def shard_names(root: Path) -> list[str]:
    """The files with the weights of the checkpoint in a folder, by its config or its index; they need not be there."""
    name = explicit_name(Checkpoint(root, str(root)).config()) or INDEX_NAME
    if not name.endswith(".json"):
        return [name]
    index = read_small_file(root / name, MAX_INDEX_BYTES)
    return [SINGLE_NAME] if index is None else sorted(set(parse_weight_map(index, name).values()))
