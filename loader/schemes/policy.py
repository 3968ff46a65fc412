"""Which scheme each module of a model gets, or why it gets none."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..errors import PolicyError, UnmatchedPatternError
from ..kernels.formats import WeightFormat
from ..options import QuantizationPolicy
from .base import LinearScheme, MoEScheme
from .expressions import UnboundedPatternError, expression
from .names import known_name
from .registry import AS_STORED, DEFAULT, PREQUANTIZED, SchemeFactory, get_entry
from .stored.weights import StoredActivations

logger = logging.getLogger("quantload")

ROUTER, EMBEDDING, HEAD = "router or gate", "embedding", "output head"
ROUTER_NAMES = frozenset({"gate", "shared_expert_gate", "gating"})
HEAD_NAMES = frozenset({"lm_head", "classifier", "score", "qa_outputs"})
EMBEDDING_NAMES = frozenset({"embed_tokens", "embed_positions", "wte", "wpe", "word_embeddings"})


def matches(pattern: str, name: str) -> bool:
    """Whether a module name fits a pattern: `re:` and a regular expression (full match), a glob, or the name."""
    if pattern.startswith("re:"):
        try:
            return expression(pattern[3:]).fullmatch(name)
        except UnboundedPatternError as error:
            raise PolicyError(f"pattern {pattern[:200]!r} {error}") from error
    return fnmatch.fnmatchcase(name, pattern)


@dataclass(frozen=True)
class Choice:
    """A scheme, or the reason why a module stays as stored; `keeps` says that the scheme takes codes as stored."""

    scheme: LinearScheme | MoEScheme | None
    reason: str = ""
    keeps: bool = False


class StoredKind(Protocol):
    """What a checkpoint says about a module it stores quantized."""

    @property
    def format(self) -> WeightFormat: ...
    @property
    def activations(self) -> StoredActivations | None: ...
    def is_in(self, *formats: str) -> bool: ...


class Policy:
    """A `QuantizationPolicy` at work on the modules of one model; remembers which patterns matched.

    `is_quantized`: the checkpoint is, and leaving it as stored is called `prequantized`.
    """

    def __init__(self, policy: QuantizationPolicy, factory: SchemeFactory, is_quantized: bool = False) -> None:
        self.policy = policy
        self._factory = factory
        self.is_quantized = is_quantized
        self.name = self._called(policy.linear)
        if policy.experts is not None and self._called(policy.experts) != self.name:
            self.name = f"{self.name}+{self._called(policy.experts)}"
        self._unused = {*policy.ignore, *(pattern for pattern, _ in policy.overrides)}
        wanted = policy.linear, policy.experts or policy.linear, *(scheme for _, scheme in policy.overrides)
        for scheme, entry in {scheme: get_entry(scheme) for scheme in wanted}.items():
            if scheme in entry.aliases:
                logger.info("%s is %s, its name in reports and metrics", scheme, entry.name)
            factory.linear(scheme)  # a name that does not exist, or has no kernel, is an error before anything is read
            factory.experts(scheme)

    def linear(self, name: str, built_in_reason: str | None, stored: StoredKind | None = None) -> Choice:
        """The choice for a linear layer. `built_in_reason` says why the model itself wants it kept, if it does.

        `stored`: how the checkpoint has it quantized. It is kept so where nothing else is wanted, and where what is
        wanted is the same.
        """
        scheme_name, reason = self._scheme_name(name, self.policy.linear, built_in_reason)
        scheme = None if scheme_name is None else self._factory.linear(scheme_name)
        if stored is not None and _keeps(scheme, stored):
            return Choice(self._factory.prequantized_linear(name, stored.format.name, stored.activations), keeps=True)
        return Choice(scheme, reason or self._as_stored(scheme_name, "linear layers"))

    def experts(self, name: str, built_in_reason: str | None, stored: StoredKind | None = None) -> Choice:
        """The choice for a fused experts module; `stored` as for linear layers."""
        default = self.policy.experts if self.policy.experts is not None else self.policy.linear
        scheme_name, reason = self._scheme_name(name, default, built_in_reason)
        scheme = None if scheme_name is None else self._factory.experts(scheme_name)
        if stored is not None and _keeps(scheme, stored):
            return Choice(self._factory.prequantized_experts(name, stored.format.name, stored.activations), keeps=True)
        return Choice(scheme, reason or self._as_stored(scheme_name, "experts"))

    def fused(self, names: Sequence[str], stored: Sequence[StoredKind | None] = ()) -> Choice:
        """The one choice for linear layers that run as one here, such as q, k and v; what is kept, by its name.

        `stored` as for linear layers, one for each name, where the checkpoint is quantized. Raises `PolicyError` with
        the choice for each of them where those differ.
        """
        kinds = stored or [None] * len(names)
        choices = [self.linear(name, name_reason(name), kind) for name, kind in zip(names, kinds, strict=True)]
        if len({_as_compared(choice) for choice in choices}) > 1:
            each = (f"{name}: {_described(choice)}" for name, choice in zip(names, choices, strict=True))
            raise PolicyError(f"linear layers that run as one must have one scheme, or all be kept: {'; '.join(each)}")
        return choices[0]

    def with_scheme(self, name: str, factory: SchemeFactory, named: Collection[str] = ()) -> Policy:
        """The same rules with another scheme for linear layers and experts, as `factory` makes it.

        The overrides with patterns in `named` give it, too. Raises what a load with that scheme would.
        """
        overrides = tuple((pattern, name if pattern in named else own) for pattern, own in self.policy.overrides)
        other = replace(self.policy, linear=name, experts=None, overrides=overrides)
        return Policy(other, factory, self.is_quantized)

    def scheme_by_name(self, name: str) -> LinearScheme | None:
        """The scheme that the override which counts for a module gives it by its name: its pattern ends with that.

        What is quantized only then is what nobody means who says `*`: embeddings, and heads that are tied to one.
        """
        child = name.rpartition(".")[2]
        first = next((each for each in self.policy.overrides if matches(each[0], name)), None)
        return self._factory.linear(first[1]) if first is not None and first[0].endswith(child) else None

    def check_patterns(self, strict: bool) -> None:
        """Warn about patterns that matched no module; in strict mode raise `UnmatchedPatternError`."""
        if not self._unused:
            return
        message = (
            f"patterns that match no linear or experts module: {', '.join(sorted(map(repr, self._unused)))}; "
            f"module names look like 'model.layers.0.self_attn.q_proj', and a regular expression begins with 're:'"
        )
        if strict:
            raise UnmatchedPatternError(message)
        logger.warning(message)

    def _called(self, scheme_name: str) -> str:
        name = get_entry(scheme_name).name
        return PREQUANTIZED if self.is_quantized and name == AS_STORED else name

    def _as_stored(self, scheme_name: str | None, kind: str) -> str:
        if self.is_quantized and scheme_name == AS_STORED:
            return "not quantized in the checkpoint"
        return f"{scheme_name} leaves {kind} as stored"

    def _scheme_name(self, name: str, default: str, built_in_reason: str | None) -> tuple[str | None, str]:
        override = self._first([pattern for pattern, _ in self.policy.overrides], name)
        ignored = self._first(self.policy.ignore, name)
        if override is not None:
            return dict(reversed(self.policy.overrides))[override], ""
        if ignored is not None:
            return None, f"ignored by pattern {ignored!r}"
        if built_in_reason is not None and self.policy.default_ignore:
            return None, built_in_reason
        return default, ""

    def _first(self, patterns: Iterable[str], name: str) -> str | None:
        """The first pattern that fits; all that fit count as used, those in its shadow too."""
        found = None
        for pattern in patterns:
            if matches(pattern, name):
                self._unused.discard(pattern)
                found = found or pattern
        return found


def _as_compared(choice: Choice) -> Hashable:
    """Equal for choices that one layer can follow."""
    scheme = choice.scheme
    if scheme is None:
        return None
    return scheme.name, scheme.kernels.format.name, scheme.kernel_names, choice.keeps


def _described(choice: Choice) -> str:
    if choice.scheme is None:
        return choice.reason
    return f"{choice.scheme.name} ({choice.scheme.kernels.format.name})" if choice.keeps else choice.scheme.name


def _keeps(scheme: LinearScheme | MoEScheme | None, stored: StoredKind) -> bool:
    """Whether a module stays as it is stored: nothing is wanted, or nothing would change."""
    if scheme is None:
        return True
    wanted = scheme.kernels.format
    return stored.is_in(*(fmt.name for fmt in (wanted, wanted.ocp) if fmt is not None))


def choose_policy(
    quantization: str, policy: QuantizationPolicy | None, is_quantized: bool = False
) -> QuantizationPolicy:
    """The policy to follow: a scheme name other than `auto` is the policy's scheme for linears.

    `auto` leaves a checkpoint that `is_quantized` as stored, for experts and in overrides too, and stands for
    `quark_mxfp4` otherwise.
    """
    policy, quantization = policy or QuantizationPolicy(), known_name(quantization)

    def meant(scheme_name: str) -> str:
        return AS_STORED if is_quantized and scheme_name == "auto" else scheme_name

    linear = meant(policy.linear if quantization == "auto" else quantization)
    return replace(
        policy,
        linear=DEFAULT if linear == "auto" else linear,
        experts=None if policy.experts is None else meant(policy.experts),
        overrides=tuple((pattern, meant(scheme_name)) for pattern, scheme_name in policy.overrides),
    )


def name_reason(name: str) -> str | None:
    """What the name says of a linear layer that is kept by default: routers, gates, embeddings, output heads.

    A layer is of a router where one of the words in its path is: `router_gate`, `gate.router_mlp.fc1`.
    """
    parts = name.split(".")
    if parts[-1] in ROUTER_NAMES or ("router" in name and any("router" in part.split("_") for part in parts)):
        return ROUTER
    if parts[-1] in EMBEDDING_NAMES:
        return EMBEDDING
    return HEAD if parts[-1] in HEAD_NAMES else None
