"""The index of a checkpoint: every tensor of every shard, checked before a byte of model memory is taken."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace

from ..errors import CheckpointError, MissingShardError, TruncatedShardError
from ..options import LoadOptions
from .folder import CONFIG_NAME, Checkpoint
from .headers import TensorEntry, read_header
from .other_kinds import some, unfinished
from .small_files import MAX_CONFIG_BYTES, check_small_file, count_values
from .source import Source, read_bytes
from .weight_map import INDEX_NAME, MAX_INDEX_BYTES, SINGLE_NAME, explicit_name, parse_weight_map


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its path relative to the checkpoint, as a `Source` takes it, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All tensors of a checkpoint by name, in the order of shards and of their headers.

    `total_bytes` is the sum of the tensors' bytes; `metadata` is that of the first shard's header. `overlaid` are
    tensors that lie in more than one shard: those of the shard that the index names are here. `read_at_once` are the
    bytes of the largest header or index, which were in memory whole; `config_values` the values in `config.json`.
    """

    shards: tuple[Shard, ...]
    tensors: dict[str, TensorEntry]
    total_bytes: int
    metadata: dict[str, str]
    overlaid: tuple[str, ...] = ()
    read_at_once: int = 0
    config_values: int = 0


def read_index(checkpoint: Checkpoint, source: Source | None = None) -> CheckpointIndex:
    """Reads and checks the headers of all shards, those transformers would load: `model.safetensors`, else the shards
    of `model.safetensors.index.json`, or the file `transformers_weights` in `config.json` names.

    `source` serves paths relative to the checkpoint (default: the files below `checkpoint.root`). A tensor in a shard
    that the index does not list is loaded, and one that lies in another shard than listed is taken from there, as in
    transformers. Of a tensor in several shards, the one in the shard that the index names for it counts. Raises
    `CheckpointError` for tensors listed but in no shard, or in several of which the index names none, its subclasses
    for missing, truncated, corrupt and unsafe shards, `UnsupportedCheckpointError` when there are only files of other
    formats.
    """
    index = _read_files(checkpoint) if source is None else _read_index(source, *_find_shards(checkpoint, source))
    return replace(index, config_values=count_values(checkpoint.root / CONFIG_NAME))


def _read_files(checkpoint: Checkpoint) -> CheckpointIndex:
    with closing(checkpoint.files.source(LoadOptions(page_cache="keep"))) as files:
        found = _find_shards(checkpoint, files)
        files.look_ahead(found[1])
        checkpoint.files.note(found[1])  # all of them before the first: they are of one moment
        try:
            return _read_index(files, *found)
        except (MissingShardError, TruncatedShardError) as error:
            left = unfinished(checkpoint.root)
            if not left:
                raise
            raise type(error)(f"{error}; a download is not finished ({some(left)}): run it again") from error


def shard_names(checkpoint: Checkpoint, source: Source) -> list[str]:
    """The paths of all shards, as `read_index` finds them, without a look into them."""
    return _find_shards(checkpoint, source)[1]


def _read_index(source: Source, index_name: str, names: list[str], listed: dict[str, str]) -> CheckpointIndex:
    shards: list[Shard] = []
    tensors: dict[str, TensorEntry] = {}
    overlaid: dict[str, list[int]] = {}
    metadata: dict[str, str] = {}
    read_at_once = source.size(index_name) if listed else 0
    for number, name in enumerate(names):
        try:
            header = read_header(source, name, number)
        except MissingShardError as error:
            absent = sum(not _exists(source, other) for other in names[number:])
            more = f" ({absent} of {len(names)} shards are missing)" if absent > 1 else ""
            raise MissingShardError(f"{index_name} names the shard {error}{more}") from None
        for tensor in [tensor for tensor in header.tensors if tensor in tensors] if tensors else ():
            overlaid.setdefault(tensor, [tensors[tensor].shard]).append(number)
            if listed.get(tensor) != name:
                del header.tensors[tensor]
        shards.append(Shard(name, header.size))
        tensors.update(header.tensors)
        metadata = metadata or header.metadata
        read_at_once = max(read_at_once, header.data_start)
    _check_overlaid(overlaid, tensors, names, listed)
    missing = [tensor for tensor in listed if tensor not in tensors]
    if missing:
        raise CheckpointError(
            f"{index_name} lists {some(missing)}, in none of its {len(names)} shards; "
            "copy or download the checkpoint again, or save it again"
        )
    return CheckpointIndex(tuple(shards), tensors, _nbytes(tensors), metadata, tuple(overlaid), read_at_once)


def _nbytes(tensors: dict[str, TensorEntry]) -> int:
    return sum(entry.nbytes for entry in tensors.values())


def _check_overlaid(
    overlaid: dict[str, list[int]], tensors: dict[str, TensorEntry], names: list[str], listed: dict[str, str]
) -> None:
    """Raise `CheckpointError` for tensors in several shards of which the index names none."""
    undecided = [tensor for tensor in overlaid if listed.get(tensor) != names[tensors[tensor].shard]]
    if undecided:
        first, again = (names[number] for number in overlaid[undecided[0]][:2])
        raise CheckpointError(
            f"{some(undecided)} in {first} and again in {again}; only one of them can be right: name it in the index, "
            f"remove the stale file from there, or save the checkpoint again"
        )


def _find_shards(checkpoint: Checkpoint, source: Source) -> tuple[str, list[str], dict[str, str]]:
    """The file that decides, the shards' names, and the listed tensors with their shard."""
    has_config = check_small_file(checkpoint.root / CONFIG_NAME, MAX_CONFIG_BYTES)
    explicit = explicit_name(checkpoint.config()) if has_config else None
    if explicit is not None and not explicit.endswith(".index.json"):
        return "config.json", [explicit], {}
    if explicit is None and _exists(source, SINGLE_NAME):
        return SINGLE_NAME, [SINGLE_NAME], {}
    index_name = explicit or INDEX_NAME
    if not _exists(source, index_name):
        raise checkpoint.files.no_model(has_config=True)
    size = source.size(index_name)
    if size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{index_name}: {size:,} bytes, an index has at most {MAX_INDEX_BYTES:,}; save it again")
    weight_map = parse_weight_map(read_bytes(source, index_name, 0, size), index_name)
    names = sorted(set(weight_map.values()))
    return index_name, names, weight_map


def _exists(source: Source, name: str) -> bool:
    try:
        source.size(name)
    except MissingShardError:
        return False
    return True
