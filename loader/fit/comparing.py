"""What each scheme would take and is expected to lose of a model, beside schemes that are chosen for the same size."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folder import Checkpoint
from ..checkpoint.resolve import resolved
from ..draft import Draft, plan_draft
from ..errors import PolicyError
from ..memory.verdict import SchemePeak
from ..options import LoadOptions, QuantizationPolicy, check_kinds
from ..schemes.names import known_name
from ..schemes.registry import AS_STORED, ENTRIES, get_entry
from .choice import Choice, choice_of, ladder_by_size
from .expected_loss import ERRORS, Item, items_of, ladder
from .peaks import scheme_peaks
from .samples import Group, sampled_errors


@dataclass(frozen=True)
class ComparedScheme:
    """A model in one scheme: bytes in the end and at the peak of a load, as planned, and what it is expected to lose.

    `error` is the relative squared error of weights: the mean over those that were sampled, in proportion to how many
    there are of a kind. `expected_loss` is the divergence of the output in nats a token. `fit_loss` is that of schemes
    that are chosen module by module so that the load peaks no higher, and `fit_schemes` says what they are: modules by
    scheme. Those are None where the smallest scheme to choose from takes more.
    """

    scheme: str
    final_bytes: int
    peak_bytes: int
    error: float
    expected_loss: float
    fit_loss: float | None
    fit_schemes: Mapping[str, int] | None


@dataclass(frozen=True)
class Comparison:
    """Schemes from the smallest to the largest; `sampled` is the part of the weights of whose kind some were read."""

    model: str
    schemes: tuple[ComparedScheme, ...]
    sampled: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_schemes(
    model_id: str | Path | Checkpoint,
    schemes: Collection[str] = (),
    *,
    device: str | torch.device = "auto",
    policy: QuantizationPolicy | None = None,
    options: LoadOptions | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """What a load with each of `schemes` (none: all there are) would take and lose, from headers and a few weights.

    `policy` says what else counts, such as what is ignored. Raises `PolicyError` for a checkpoint that is quantized
    already, and for schemes that the model, the device or the scale mode does not go with.
    """
    check_kinds(policy, options)
    policy, options = policy or QuantizationPolicy(), options or LoadOptions()
    if policy.linear != "auto" or policy.experts is not None:
        raise PolicyError("compare gives each scheme to linear layers and experts: name no other one for them")
    base = ladder([entry.name for entry in ENTRIES if entry.has_mode(policy.scale_mode)])[0]
    with resolved(model_id, revision) as checkpoint:
        if checkpoint.is_quantized:
            raise PolicyError("compare is for checkpoints in BF16, FP16 or FP32; this one is quantized already")
        draft = plan_draft(
            *(checkpoint, "auto"), device=device, policy=replace(policy, linear=base), options=options,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        peaks = _peaks(draft, options, base)
        wanted = _wanted(schemes, peaks)
        items = items_of(draft, policy)
        schemes_to_mix = ladder_by_size(peaks.values())
        errors = sampled_errors(draft, checkpoint, items, {*wanted, *schemes_to_mix}, policy)
    model = _Model(draft, policy, items, schemes_to_mix, errors)
    found = sorted((peaks[name] for name in wanted), key=lambda each: (each.final_bytes, each.scheme))
    return Comparison(checkpoint.model_id, tuple(model.compared(each) for each in found), model.sampled)


def _peaks(draft: Draft, options: LoadOptions, base: str) -> dict[str, SchemePeak]:
    """By scheme: all that can be loaded, the one of the draft, and what is stored."""
    memory = draft.plan.memory
    own = SchemePeak(base, memory.final_bytes, memory.peak_bytes)
    return {each.scheme: each for each in (own, *scheme_peaks(draft, options, stored=True))}


def _wanted(schemes: Collection[str], peaks: Mapping[str, SchemePeak]) -> list[str]:
    """The schemes to compare, by their own names. Raises `PolicyError` for one that cannot be loaded."""
    names = list(dict.fromkeys(get_entry(known_name(name)).name for name in schemes)) or list(peaks)
    missing = [name for name in names if name not in peaks]
    if missing:
        raise PolicyError(f"this model cannot be loaded in {', '.join(missing)}; it can in {', '.join(peaks)}")
    return names


class _Model:
    """What is known of a model, and what follows from it for a scheme."""

    def __init__(
        self,
        draft: Draft,
        policy: QuantizationPolicy,
        items: Sequence[Item],
        schemes: Sequence[str],
        errors: Mapping[str, Mapping[Group, float]],
    ) -> None:
        self._items = items
        self._errors = errors
        self._peak = draft.plan.memory.peak_bytes
        self._choice: Choice = choice_of(draft, policy, schemes, self._error)
        stored = [sizes[-1] for sizes in self._choice.sizes]
        self._weights = [size / max(sum(stored), 1) for size in stored]

    @property
    def sampled(self) -> float:
        """The part of the weights, by their bytes as stored, of which there are samples."""
        known = self._errors[self._choice.schemes[0]]
        return sum(
            part for item, part in zip(self._items, self._weights, strict=True) if (item.kind, item.third) in known
        )

    def compared(self, scheme: SchemePeak) -> ComparedScheme:
        """A scheme for all modules, and what can be chosen within its peak."""
        errors = [self._error(item, scheme.scheme) for item in self._items]
        fit = self._fit(scheme.peak_bytes)
        return ComparedScheme(
            scheme.scheme,
            scheme.final_bytes,
            scheme.peak_bytes,
            sum(error * part for error, part in zip(errors, self._weights, strict=True)),
            sum(error * item.loss for error, item in zip(errors, self._items, strict=True)),
            *((None, None) if fit is None else fit),
        )

    def _fit(self, peak: int) -> tuple[float, dict[str, int]] | None:
        choice, more = self._choice, peak - self._peak
        fitting = [levels for levels in (choice.best(more), *choice.uniform()) if choice.more(levels) <= more]
        if not fitting:
            return None
        levels = min(fitting, key=choice.loss)
        modules: dict[str, int] = {}
        for item, level in zip(self._items, levels, strict=True):
            scheme = choice.schemes[level]
            modules[scheme] = modules.get(scheme, 0) + len(item.names)
        return choice.loss(levels), modules

    def _error(self, item: Item, scheme: str) -> float:
        """As sampled of its kind and depth; where nothing was, what is known of the scheme, or the mean of others."""
        found = self._errors.get(scheme, {})
        known = found.get((item.kind, item.third))
        if known is not None:
            return known
        if scheme == AS_STORED:
            return 0.0
        return ERRORS[scheme] if scheme in ERRORS else sum(found.values()) / max(len(found), 1)
