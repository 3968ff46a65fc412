"""From what the user gave (folder or hub id) to a local folder with the checkpoint's files."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CheckpointError, UnsupportedCheckpointError
from .identity import FileIdentities
from .quantization_config import FILES as QUANTIZATION_FILES
from .quantization_config import with_quantization_config
from .small_files import read_json_object, read_small_file
from .weight_map import INDEX_NAME, MAX_INDEX_BYTES, SINGLE_NAME, explicit_name, parse_weight_map

# Everything transformers reads beside the weights. Never pickles.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.codes", "*.tokenizer", "*.py")
"""What lies beside the weights, by name: configs, code, and the vocabularies of all tokenizers of transformers."""
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
logger = logging.getLogger("quantload")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with a checkpoint, and the name the user gave for it."""

    root: Path
    model_id: str
    identities: FileIdentities = field(init=False, repr=False, compare=False)
    """What its files were when they were first looked at, by all who read it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "identities", FileIdentities(self.root))

    def note_configs(self) -> None:
        """Remember what the files are that say which model it is, before transformers reads them."""
        self.identities.note((CONFIG_NAME, *QUANTIZATION_FILES, GENERATION_CONFIG_NAME))

    def note_small_files(self) -> None:
        """Remember what else lies beside the weights, such as the files of a tokenizer."""
        names = {path.name for pattern in SMALL_FILES for path in self.root.glob(pattern) if path.is_file()}
        self.identities.note(sorted(names))

    def note_code(self) -> None:
        """Remember what the modeling code is."""
        self.identities.note(sorted(path.name for path in self.root.glob("*.py")))

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
            raise CheckpointError(f"{self.root}: has no config.json; give the folder or hub id of a transformers model")
        return with_quantization_config(self.root, config, read_json_object)


def resolve(model_id: str | Path | Checkpoint, revision: str | None = None) -> Checkpoint:
    """The checkpoint a folder or hub id stands for; a hub id is downloaded, or taken from the cache when offline.

    One that was resolved before is itself: what it was then counts, whatever its name stands for now.

    Only safetensors weights and small text files are downloaded. Raises `CheckpointError` when there is no such
    folder or repository, `UnsupportedCheckpointError` for URLs.
    """
    if isinstance(model_id, Checkpoint):
        return model_id
    given = str(model_id)
    if _URL.match(given):
        raise UnsupportedCheckpointError(
            f"{given!r} is a URL; only folders and hub ids are opened directly: copy its config and tokenizer to a "
            "folder and pass a quantload.checkpoint.Source that reads the weights"
        )
    if not given:
        raise CheckpointError("the model is empty (''); give a folder or a hub id such as 'Qwen/Qwen3-0.6B'")
    folder = Path(given).expanduser()
    if folder.is_dir():
        if revision is not None:
            logger.warning("%s is a folder, which has no revisions: %r is not looked at", folder, revision)
        # Without links, so that one that is turned to another version meanwhile does not mix the two.
        return Checkpoint(folder.resolve(), given)
    if folder.exists():
        raise CheckpointError(f"{given!r} is a file; give the folder it lies in, with its config.json")
    if isinstance(model_id, Path) or _looks_local(given):
        raise CheckpointError(
            f"{given!r} is no folder here; check the path, or give a hub id such as 'Qwen/Qwen3-0.6B'"
        )
    return Checkpoint(_download(given, revision), given)


def _looks_local(given: str) -> bool:
    return given.startswith((".", "/", "~")) or given.endswith("/") or "\\" in given or given.count("/") > 1


def _download(repo: str, revision: str | None) -> Path:
    """Fetches the small files, then exactly the shards they call for, of the same commit."""
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=list(SMALL_FILES)))
        shards = _shards_to_fetch(root)
        if all((root / shard).exists() for shard in shards):
            return root
        return Path(snapshot_download(repo, revision=root.name, allow_patterns=shards))
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
    except CheckpointError:
        raise
    except Exception as error:  # its releases raise the errors of different network libraries
        raise CheckpointError(f"{repo!r} could not be downloaded: {error}; try again or give a folder") from error


def _shards_to_fetch(root: Path) -> list[str]:
    name = explicit_name(Checkpoint(root, str(root)).config()) or INDEX_NAME
    if not name.endswith(".json"):
        return [name]
    index = read_small_file(root / name, MAX_INDEX_BYTES)
    return [SINGLE_NAME] if index is None else sorted(set(parse_weight_map(index, name).values()))
