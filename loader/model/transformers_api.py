"""The one module that touches what transformers keeps private about loading.

Everything here is tested on the oldest and the newest transformers the package allows.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo
from transformers.monkey_patching import patch_output_recorders

from ..checkpoint.folder import CONFIG_NAME, GENERATION_CONFIG_NAME
from ..checkpoint.small_files import MODEL_FILES, check_values, read_small_file
from ..errors import CheckpointError, QuantloadError, UnsupportedCheckpointError
from ..interrupts import interrupt_held
from .name_families import Member, families, rename_family
from .ties import shared_from_the_start, tied_to_what_is_there

_default_dtype = threading.Lock()
"""Held while transformers builds on torch's default dtype, which it sets for the whole process: one load at a time."""

_TIE_WEIGHTS = PreTrainedModel.tie_weights
"""transformers puts another in its place while it builds a model that it is going to load."""

MAX_GENERATION_VALUES = 1 << 17
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModel",
)

# What these make of a name depends on the name alone; others may remember what they have seen.
FORGETFUL = (WeightRenaming, PrefixChange, WeightConverter)


def load_config(root: Path, trust_remote_code: bool) -> Any:
    """The transformers config of the checkpoint folder `root`; whatever is wrong with it is a `CheckpointError`."""
    try:
        return AutoConfig.from_pretrained(root, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes validate in many ways, each with exceptions of its own
        raise CheckpointError(
            f"{root / CONFIG_NAME}: transformers {transformers.__version__} cannot read it as the config of a model: "
            f"{_said(error)}; the weights have not been looked at: compare the file with the original of this "
            f"checkpoint, or update transformers if it does not know the model yet"
        ) from error


def forget_quantization(config: Any) -> None:
    """Take what is said of quantization out of a config and those of its parts: it is about files, not the model."""
    for name in ("quantization_config", "compression_config"):
        config.__dict__.pop(name, None)
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, dict):
            forget_quantization(part)


def model_class(config: Any, root: Path, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The class `config.architectures` names."""
    names = getattr(config, "architectures", None)
    if not isinstance(names, (list, tuple)) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"{root / CONFIG_NAME}: `architectures` is {names!r}; expected a list with the name of the model class, "
            f'such as ["LlamaForCausalLM"]: copy the field from the original of this checkpoint'
        )
    found = getattr(transformers, names[0], None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    if getattr(config, "auto_map", None) is not None and trust_remote_code:
        return _remote_class(config, root)
    ships_code = getattr(config, "auto_map", None) is not None
    advice = "pass trust_remote_code=True to run the code it ships" if ships_code else "update transformers"
    raise UnsupportedCheckpointError(
        f"{root / CONFIG_NAME}: architecture {names[0]!r} is not a model class of transformers "
        f"{transformers.__version__}; {advice}, or correct `architectures`"
    )


def _said(error: Exception) -> str:
    """What an exception says, on one line; the names of most say what kind of value was wrong."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _remote_class(config: Any, root: Path) -> type[PreTrainedModel]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    for auto_class in AUTO_CLASSES:
        reference = config.auto_map.get(auto_class)
        if reference is not None:
            remote: type[PreTrainedModel] = get_class_from_dynamic_module(reference, str(root))
            return remote
    raise UnsupportedCheckpointError(
        f"{root / CONFIG_NAME}: auto_map names {', '.join(config.auto_map)}; expected one of "
        f"{', '.join(AUTO_CLASSES)}: name the model's class there"
    )


def settle_dtype(config: Any, stored: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype `from_pretrained(dtype="auto")` would choose, written into the config and its sub-configs.

    The config's own dtype, else that of the first floating tensor in `stored`, else float32.
    """
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, dict):
        dtype = dtype.get("", torch.get_default_dtype())
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    settled: torch.dtype
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        settled = dtype
    else:
        settled = next((d for d in stored if d.is_floating_point and d.itemsize > 1), torch.float32)
    config.dtype = settled
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None:
            sub.dtype = settled
    return settled


def meta_model(cls: type[PreTrainedModel], config: Any, root: Path, dtype: torch.dtype) -> PreTrainedModel:
    """An instance of `cls` on the meta device, as `from_pretrained` builds it with the config of the folder `root`."""
    with _default_dtype, interrupt_held(), contextlib.ExitStack() as stack:
        for context in cls.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        try:
            model = cls(config)
        except QuantloadError:
            raise
        except Exception as error:  # what a model class makes of impossible sizes is its own affair
            listed = isinstance(getattr(cls, "_tied_weights_keys", None), (list, tuple))
            if listed and isinstance(error, AttributeError) and "keys" in str(error):
                raise UnsupportedCheckpointError(
                    f"{cls.__name__} was written for transformers 4: its `_tied_weights_keys` are "
                    f"{cls._tied_weights_keys!r}, and transformers {transformers.__version__} takes a mapping only, "
                    f"from each of them to the parameter that it is tied to: change the code of the model so"
                ) from error
            raise CheckpointError(
                f"{root / CONFIG_NAME}: transformers {transformers.__version__} cannot build a {cls.__name__} of it: "
                f"{_said(error)}; the weights have not been looked at: compare the file with the original of this "
                f"checkpoint"
            ) from error
        patch_output_recorders(model)
    if model.is_custom_code():  # those of transformers itself say what they share
        model.all_tied_weights_keys = {**shared_from_the_start(model), **getattr(model, "all_tied_weights_keys", {})}
    return model


@dataclass(slots=True)
class Conversion:
    """Checkpoint tensors that become parameters together.

    `sources` maps a source pattern to checkpoint names in the order transformers would collect them. Without a
    `converter` there is one name, copied as it is. `mixed` are the patterns whose names came in several sorted parts.
    """

    target: str
    converter: Any | None
    sources: dict[str, list[str]] = field(default_factory=dict)
    mixed: set[str] = field(default_factory=set)

    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def add(self, pattern: str | None, names: list[str]) -> None:
        """Take sources, sorted among themselves."""
        for key, group in ((pattern, names),) if pattern is not None else ((name, [name]) for name in names):
            held = self.sources.setdefault(key, [])
            held += group
            if len(held) > len(group):
                self.mixed.add(key)

    def sort(self) -> None:
        """Bring the sources into transformers' order, whatever order they were found in."""
        for pattern in self.mixed:
            self.sources[pattern].sort(key=dot_natural_key)
        if len(self.sources) > 1:
            self.sources = dict(sorted(self.sources.items(), key=lambda source: dot_natural_key(source[1][0])))


@dataclass(slots=True)
class NamePlan:
    """What transformers' renaming says about every checkpoint name."""

    conversions: list[Conversion]
    unexpected: list[str]
    weight_conversions: list[Any]


def plan_names(model: PreTrainedModel, names: Iterable[str]) -> NamePlan:
    """Rename and group checkpoint names as transformers would, without a tensor."""
    mapping = get_model_conversion_mapping(model) or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, meta = model.base_model_prefix, model.state_dict()

    def rename(name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if renamed not in meta and name in meta:
            renamed, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=meta)
        return renamed, pattern

    conversions: dict[str, Conversion] = {}
    unexpected: list[str] = []
    for members in _families(names, mapping):
        gathered: dict[tuple[str, str | None], list[str]] = {}
        for name, renamed in rename_family(members, rename, meta):
            gathered.setdefault(renamed, []).append(name)
        for (target, pattern), found in gathered.items():
            if target not in meta:
                unexpected += found
                continue
            converter = None if pattern is None else by_pattern[pattern]
            conversions.setdefault(target, Conversion(target, converter)).add(pattern, found)
    for conversion in conversions.values():
        conversion.sort()
    return NamePlan(list(conversions.values()), unexpected, [entry for entry in mapping if entry.was_used()])


def _families(names: Iterable[str], mapping: Iterable[Any]) -> Iterable[list[Member]]:
    """Names by family; each alone, and in transformers' order, if a renaming remembers those it has seen."""
    if all(type(entry) in FORGETFUL for entry in mapping):
        return sorted(families(names), key=lambda members: dot_natural_key(members[0][1]))
    return [[([], name)] for name in sorted(names, key=dot_natural_key)]


def convert(model: PreTrainedModel, conversion: Conversion, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Run transformers' operations of one conversion on `tensors` (by checkpoint name); parameters by full name.

    The tensors may be real or `Coordinates`.
    """
    return full_names(conversion, operate(model, conversion, tensors))


def operate(model: PreTrainedModel, conversion: Conversion, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The operations of `convert`: their results by the part of the target's name that they stand for."""
    if conversion.converter is None:
        # Two checkpoint names for one parameter: transformers lets the first one in sorted order win.
        return {"": tensors[conversion.names()[0]]}
    converter = conversion.converter
    collected: dict[str, Any] = {
        pattern: [tensors[name] for name in names] for pattern, names in conversion.sources.items()
    }
    for operation in converter.operations:
        collected = operation.convert(
            collected,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=conversion.target,
            model=model,
            config=model.config,
            missing_keys=None,
        )
    return {name: value[0] if isinstance(value, list) else value for name, value in collected.items()}


def full_names(conversion: Conversion, results: dict[str, Any]) -> dict[str, Any]:
    """What `operate` returns, by the full names of the parameters."""
    if conversion.converter is None:
        return {conversion.target: results[""]}
    full = conversion.target.replace("*.", "0.")
    for key in results:
        if key in full:
            before, _, after = full.partition(key)
            return {before + name + after: value for name, value in results.items()}
    return results


def asks_for_shapes_only(conversion: Conversion) -> bool:
    """Whether `operate` does the same for all targets whose sources and parameters have the same shapes.

    True of transformers' general operations; one that a model brings along may ask for its layer's number.
    """
    operations = () if conversion.converter is None else conversion.converter.operations
    return all(type(operation).__module__ == ConversionOps.__module__ for operation in operations)


class DtypePlan:
    """The dtype each parameter gets when it is not quantized, `_keep_in_fp32_modules` included."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        plan = model._get_dtype_plan(dtype)
        self._patterns: list[tuple[re.Pattern[str], torch.dtype]] = [
            (re.compile(name.replace("*", r".*")), wanted) for name, wanted in plan.items()
        ]

    def __call__(self, name: str, created: torch.dtype) -> torch.dtype:
        for pattern, wanted in self._patterns:
            if pattern.search(name):
                return wanted
        return created


def tie_to(model: PreTrainedModel, there: Collection[str]) -> None:
    """Let every tied parameter of `model` get its values from one that is in `there`, where any of its group is."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    if ties:
        model.all_tied_weights_keys = tied_to_what_is_there(ties, there)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Parameters that are tied to another one and need no tensor of their own."""
    return set(getattr(model, "all_tied_weights_keys", {}))


def tied_parameters(model: PreTrainedModel) -> set[str]:
    """Parameters that share their storage with another one, on either side."""
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {*keys.keys(), *keys.values()}


def loading_info(missing: Iterable[str], unexpected: Iterable[str]) -> LoadStateDictInfo:
    values: dict[str, Any] = {
        "missing_keys": set(missing), "unexpected_keys": set(unexpected), "mismatched_keys": set(),
        "conversion_errors": {}, "error_msgs": [], "skipped_pp_keys": set(),
    }  # fmt: skip
    known = inspect.signature(LoadStateDictInfo).parameters
    return LoadStateDictInfo(**{name: value for name, value in values.items() if name in known})


def complaints(model: PreTrainedModel, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[set[str], set[str]]:
    """Missing and unexpected names left after the exceptions the model class declares."""
    info = loading_info(missing, unexpected)
    model._adjust_missing_and_unexpected_keys(info)
    return set(info.missing_keys) - tied_names(model), set(info.unexpected_keys)


def mark_loaded(model: PreTrainedModel) -> None:
    """Let transformers initialize nothing of what has its values."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor._is_hf_initialized = True


def on_cpu() -> contextlib.AbstractContextManager[Any]:
    """For code that makes tensors without saying where: on the CPU, whatever default device a user has set."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextlib.contextmanager
def outside_of_building() -> Iterator[None]:
    """For a load while `from_pretrained` builds, in the model's dtype and without ties: both as they are elsewhere."""
    dtype, tie_weights = torch.get_default_dtype(), PreTrainedModel.tie_weights
    torch.set_default_dtype(torch.float32)
    PreTrainedModel.tie_weights = _TIE_WEIGHTS
    try:
        yield
    finally:
        PreTrainedModel.tie_weights = tie_weights
        torch.set_default_dtype(dtype)


def load_nothing_more(model: PreTrainedModel, checkpoint_files: list[str], unexpected: Collection[str]) -> None:
    """Let `from_pretrained`, which prepares `model` for these files, take it for loaded, up to `finish`.

    It gets a file without a tensor to load, and once that is done, the names it would have found out itself.
    """
    empty = tempfile.NamedTemporaryFile(suffix=".safetensors")  # noqa: SIM115  # closed when it has been read
    safetensors.torch.save_file({}, empty.name, metadata={"format": "pt"})
    checkpoint_files[:] = [empty.name]

    def after_loading(info: LoadStateDictInfo) -> None:
        del model.mark_tied_weights_as_initialized  # the method of the class is there again
        empty.close()
        info.missing_keys, info.unexpected_keys = set(), set(unexpected)
        model.mark_tied_weights_as_initialized(info)

    def keep_buffers(*_: Any) -> None:
        """Those that no checkpoint has would be made anew, and not computed: their modules are initialized."""
        del model._move_missing_keys_from_meta_to_device

    model.mark_tied_weights_as_initialized = after_loading
    model._move_missing_keys_from_meta_to_device = keep_buffers


def save_under_own_names(model: PreTrainedModel) -> None:
    """Let `save_pretrained` write every tensor under its name in the model: there is no way back for codes."""
    model._weight_conversions = []


def build_again(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a model in place what it was before it had weights."""
    other = meta_model(type(model), model.config, Path(str(model.config.name_or_path)), dtype)
    model.__dict__.clear()
    model.__dict__.update(other.__dict__)


def finish(
    model: PreTrainedModel, missing: Iterable[str], weight_conversions: list[Any], device: torch.device
) -> dict[str, str]:
    """What transformers does after the last tensor: missing parameters, non-persistent buffers, tying.

    Returns the pairs that the model ties and the checkpoint has with different values: they are left apart.
    """
    ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    mark_loaded(model)
    info = loading_info(missing, ())
    config = LoadStateDictConfig(
        pretrained_model_name_or_path=getattr(model.config, "name_or_path", None), device_map={"": device}
    )
    with _default_dtype, interrupt_held():
        type(model)._finalize_model_loading(model, config, info)
    model._weight_conversions = weight_conversions
    model.eval()
    return {name: other for name, other in ties.items() if name not in model.all_tied_weights_keys}


def adopt_generation_config(model: PreTrainedModel, root: Path) -> None:
    """Take the generation config of the checkpoint folder, or make one from its model config where it has none.

    Raises `CheckpointError` for one that is none.
    """
    if not model.can_generate():
        return
    own = read_small_file(root / GENERATION_CONFIG_NAME, MODEL_FILES[GENERATION_CONFIG_NAME])
    has_own = own is not None
    if own is not None:
        check_values(root / GENERATION_CONFIG_NAME, own, MAX_GENERATION_VALUES)
    name, how = (GENERATION_CONFIG_NAME, {}) if has_own else (CONFIG_NAME, {"_from_model_config": True})
    try:
        model.generation_config = GenerationConfig.from_pretrained(root, config_file_name=name, **how)
    except Exception as error:  # of many kinds, as for the config of a model
        instead = f", or remove it, for what {CONFIG_NAME} says of generation" if has_own else ""
        raise CheckpointError(
            f"{root / name}: transformers {transformers.__version__} cannot read it as a generation config: "
            f"{_said(error)}; correct it by the original of this checkpoint{instead}"
        ) from error


def choose_experts_forward(module: Any, implementation: str) -> None:
    """Run one experts module with a registered forward; the config it asks is its own from now on."""
    module.config = copy.copy(module.config)
    module.config._experts_implementation_internal = implementation


def tell_quantized(module: Any) -> None:
    """Send modeling code that has a branch for quantized weights into it; the config it asks is its own from now on."""
    module.config = copy.copy(module.config)
    module.config._is_quantized = True


def parallel_plans(model: PreTrainedModel) -> tuple[dict[str, str], dict[str, str]]:
    """The plans of tensor and of expert parallelism of a model: style by name, with `*` for numbers; empty for none."""
    return dict(getattr(model, "_tp_plan", None) or {}), dict(getattr(model, "_ep_plan", None) or {})


def parallel_style(name: str) -> Any:
    """transformers' own hooks of a style of parallelism; imported late, as it takes DTensors along."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    return ALL_PARALLEL_STYLES[name]


def output_heads(model: nn.Module) -> set[int]:
    """The ids of the modules that turn hidden states into logits, where a model, or one within it, says which.

    A model may have one for each codebook, in a list.
    """
    return {id(head) for part in model.modules() for found in _output_embeddings(part) for head in found.modules()}


def _output_embeddings(model: nn.Module) -> list[nn.Module]:
    if not hasattr(type(model), "get_output_embeddings"):
        return []
    try:
        found: Any = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    several = found.values() if isinstance(found, Mapping) else found if isinstance(found, (list, tuple)) else (found,)
    return [head for head in several if isinstance(head, nn.Module)]


def rebuilt(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Another model of the class of `model` on meta, of another config; `CheckpointError` if its class refuses it."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return meta_model(type(model), config, Path(str(config.name_or_path)), dtype)
