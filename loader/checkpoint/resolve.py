"""From what the user gave (folder or hub id) to a local folder with the checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import ModelNotFoundError, QuantloadError
from .folder import CONFIG_NAME, CONFIGS, DOCUMENTS, SMALL_FILES, Checkpoint, resolve_folder, shard_names
from .other_kinds import names_error
from .remote.opening import open_remote


def resolve(model_id: str | Path | Checkpoint, revision: str | None = None) -> Checkpoint:
    """The checkpoint a folder or hub id stands for; a hub id is downloaded, or taken from the cache when offline.

    One that was resolved before is itself: what it was then counts, whatever its name stands for now.

    Only safetensors weights and small text files are downloaded. A URL stands for itself: its weights are read where
    they are, and its small files are in a folder of the checkpoint that `files.close` removes. Raises
    `ModelNotFoundError` when there is no such folder or repository, `UnsupportedCheckpointError` for URLs and files of
    other kinds.
    """
    if isinstance(model_id, Checkpoint):
        return model_id
    here = resolve_folder(model_id, revision)
    if here is not None:
        return here
    given = str(model_id)
    remote = open_remote(given, revision)
    if remote is None:
        return Checkpoint(_download(given, revision), given)
    remote.gather(CONFIGS)
    return Checkpoint(remote.root, remote.shown, remote)


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
        raise ModelNotFoundError(f"{repo!r} is neither a folder here nor a valid hub id (owner/name)") from None
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo!r} is gated; accept its licence on the hub, then run 'hf auth login' or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repo!r} has no revision {revision!r}; name a branch, a tag or a commit") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo!r} is neither a folder here nor a repository on the hub; check the spelling, "
            "or log in with 'hf auth login' if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo!r} is no folder here, not in the hub cache, and the hub cannot be reached; "
            f"connect once and run 'hf download {repo}', unset HF_HUB_OFFLINE, or give a folder"
        ) from error
    except QuantloadError:
        raise
    except Exception as error:  # its releases raise the errors of different network libraries
        raise ModelNotFoundError(f"{repo!r} could not be downloaded: {error}; try again or give a folder") from error


def _no_model(repo: str, root: Path, *, has_config: bool) -> QuantloadError:
    """The error for a repository without a model, by the names of all its files where the hub says them."""
    try:
        names = HfApi().list_repo_files(repo, revision=root.name)
    except Exception:  # offline, of whatever library: what is there is all there is to go by
        names = [path.name for path in root.iterdir()]
    lacking = "weights in safetensors" if has_config else "config.json"
    return names_error(
        repr(repo), [name for name in names if "/" not in name], has_config=has_config
    ) or ModelNotFoundError(f"{repo!r} has no {lacking}; give the hub id of a transformers model")
