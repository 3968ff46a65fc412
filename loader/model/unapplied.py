"""What a user asked for and a model did not get: schemes, patterns and options that change nothing, with the reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import UnappliedOptionError
from ..options import LoadOptions, QuantizationPolicy
from ..schemes.policy import Policy, matches
from ..schemes.registry import AS_STORED
from .skeleton import Assignment

logger = logging.getLogger("quantload")

_SHOWN = 3
_KINDS = {"linear": "linear layers", "experts": "experts modules", "embedding": "embeddings"}
_LOADING = "quantize", "observe", "finish_scales"


@dataclass(frozen=True)
class Unapplied:
    """An option of the command line, with the value it had, why it changes nothing, and the modules it was about.

    `is_unmatched`: it is a pattern without a linear or experts module, which `Policy.check_patterns` warns of.
    """

    option: str
    reason: str
    modules: tuple[str, ...] = ()
    is_unmatched: bool = False

    def __str__(self) -> str:
        more = f" and {len(self.modules) - _SHOWN} more" if len(self.modules) > _SHOWN else ""
        about = f" ({', '.join(self.modules[:_SHOWN])}{more})" if self.modules else ""
        return f"{self.option} changes nothing: {self.reason}{about}"


def find_unapplied(
    model: nn.Module, rules: Policy, assignments: Sequence[Assignment], options: LoadOptions, computes: bool = True
) -> list[Unapplied]:
    """Everything that was asked for without effect. `computes`: the model is to run, and not only to be written."""
    return [
        *_patterns(model, rules, assignments),
        *_schemes(rules.policy, assignments),
        *_defaults(rules.policy, assignments),
        *_options(rules.policy, assignments, options, computes),
    ]


def tell_unapplied(found: Iterable[Unapplied], strict: bool) -> None:
    """Warn of all of it that nobody has warned of; in strict mode raise `UnappliedOptionError`."""
    lines = [str(each) for each in found if not each.is_unmatched]
    if lines and strict:
        raise UnappliedOptionError("; ".join(lines))
    for line in lines:
        logger.warning("%s", line)


def _patterns(model: nn.Module, rules: Policy, assignments: Sequence[Assignment]) -> Iterator[Unapplied]:
    """Ignore and override patterns: without a module, behind another, and such that nothing can be done about."""
    policy = rules.policy
    if not policy.overrides and not policy.ignore:
        return
    decided: dict[str, int] = {}  # module to the number of the override that counts
    for number, (pattern, scheme) in enumerate(policy.overrides):
        option, fitting = f"--override {pattern}={scheme}", _fitting(pattern, assignments)
        own = [each for each in fitting if decided.setdefault(each.name, number) == number]
        if not fitting:
            yield _unmatched(option, pattern, model)
        elif not own:
            yield Unapplied(option, "another --override comes first", _names(fitting))
        elif scheme != AS_STORED and all(each.scheme is None for each in own):
            yield Unapplied(option, _reasons(own), _names(own))
    for pattern in policy.ignore:
        fitting = _fitting(pattern, assignments)
        if not fitting:
            yield _unmatched(f"--ignore {pattern}", pattern, model)
        elif all(each.name in decided for each in fitting):
            yield Unapplied(f"--ignore {pattern}", "an --override counts more", _names(fitting))


def _unmatched(option: str, pattern: str, model: nn.Module) -> Unapplied:
    """For a pattern without a linear or experts module: there may be another one that it fits."""
    others = [(name, type(module).__name__) for name, module in model.named_modules() if matches(pattern, name)]
    if not others:
        return Unapplied(option, "it fits no module", is_unmatched=True)
    return Unapplied(
        option,
        f"it fits no linear or experts module, only a module of {others[0][1]}; it must fit the whole name",
        tuple(name for name, _ in others),
        is_unmatched=True,
    )


def _schemes(policy: QuantizationPolicy, assignments: Sequence[Assignment]) -> Iterator[Unapplied]:
    """Schemes that no module gets."""
    patterns = [pattern for pattern, _ in policy.overrides]
    others = [each for each in assignments if not any(matches(pattern, each.name) for pattern in patterns)]
    rest = others
    if policy.experts is not None:
        experts = [each for each in others if each.kind == "experts"]
        rest = [each for each in others if each.kind == "linear"]
        yield from _scheme(f"--experts {policy.experts}", policy.experts, experts, ["experts"])
    kinds = ["linear"] if policy.experts is not None else ["linear", "experts"]
    if not policy.overrides or any(each.role is None for each in rest):  # those with a role are kept in any case
        yield from _scheme(f"--quantization {policy.linear}", policy.linear, rest, kinds)


def _scheme(option: str, scheme: str, modules: Sequence[Assignment], kinds: Sequence[str]) -> Iterator[Unapplied]:
    if scheme == AS_STORED or any(each.scheme is not None for each in modules):
        return
    present = {each.kind for each in modules}
    absent = [f"the model has no {_KINDS[kind]}" for kind in kinds if kind not in present]
    yield Unapplied(option, "; ".join([*absent, *([_reasons(modules)] if modules else [])]))


def _defaults(policy: QuantizationPolicy, assignments: Sequence[Assignment]) -> Iterator[Unapplied]:
    """Heads and routers that were to be quantized, too, and cannot be."""
    if not policy.default_ignore and policy.linear != AS_STORED:
        heads = [each for each in assignments if each.role is not None and not each.is_possible]
        if heads and all(each.scheme is None for each in assignments if each.role is not None):
            yield Unapplied("--no-default-ignore", _reasons(heads), _names(heads))


def _options(
    policy: QuantizationPolicy, assignments: Sequence[Assignment], options: LoadOptions, computes: bool
) -> Iterator[Unapplied]:
    quantized = [each for each in assignments if each.scheme is not None]
    online = [each for each in quantized if each.stored is None]
    if policy.scale_mode != "default" and not online:
        yield Unapplied(f"--scale-mode {policy.scale_mode}", "no module is quantized by this load")
    if options.activations not in ("auto", "none") and not quantized:
        yield Unapplied(f"--activations {options.activations}", "no module is quantized")
    kinds = {each.kind for each in quantized}
    for operation, kernel in options.kernels.items():
        reason = None
        if operation in _LOADING and not online:
            reason = "no module is quantized by this load"
        elif operation in ("linear", "experts") and not computes:
            reason = "a conversion computes nothing with its weights"
        elif operation in ("linear", "experts") and operation not in kinds:
            called = _KINDS[operation]
            reason = f"no {called} are quantized"
        if reason is not None:
            yield Unapplied(f"--kernel {operation}={kernel}", reason)


def _fitting(pattern: str, assignments: Iterable[Assignment]) -> list[Assignment]:
    return [each for each in assignments if matches(pattern, each.name)]


def _names(assignments: Iterable[Assignment]) -> tuple[str, ...]:
    return tuple(each.name for each in assignments)


def _reasons(assignments: Iterable[Assignment]) -> str:
    """Why modules are not quantized, the most frequent reason first."""
    counted: Mapping[tuple[str, str], int] = Counter((each.kind, each.reason) for each in assignments)
    ordered = sorted(counted.items(), key=lambda pair: -pair[1])
    if len(ordered) == 1:
        return ordered[0][0][1]
    return "; ".join(f"{_KINDS[kind]}: {reason} ({count})" for (kind, reason), count in ordered)
