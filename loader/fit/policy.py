"""Choose a scheme for every module, so that least is lost of a model that stays below a size.

All modules begin with the smallest scheme of a ladder. Then that step up is taken, again and again, which saves most
expected loss for its bytes, among those that still fit; one scheme for all modules is taken where that is expected to
lose less. The model is planned once more with what was chosen: that plan's size is what counts.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..checkpoint.folder import Checkpoint
from ..checkpoint.index import CheckpointIndex
from ..draft import Draft, plan_draft
from ..errors import MemoryBudgetError, PolicyError
from ..memory.amounts import format_bytes
from ..memory.budget import smaller_staging
from ..memory.report import FitReport, FitRow
from ..options import LoadOptions, QuantizationPolicy, without_fit
from ..schemes.registry import AS_STORED, ENTRIES
from .choice import Choice, Sizes, choice_of, ladder_of
from .expected_loss import NOTHING, ladder
from .room import Room, free_room
from .vocabulary import NO_VOCABULARY, Vocabulary, as_planned, vocabulary_of

logger = logging.getLogger("quantload")
MOST_TRIES = 4
LARGEST_DIFFERENCE = 1 << 20
"""By so many bytes, at most, what is held beside weights and arena differs from scheme to scheme; what is read in place
needs a small arena only."""
MANY_TENSORS = 2000
"""A draft of so many takes some MiB, and collecting it a tenth of a second."""


@dataclass(frozen=True)
class Fitted:
    """A policy whose load stays below `room.size` bytes, by its plan; of a conversion, its files of weights do.

    `planned_bytes` is what counts against that, `expected_loss` the divergence of the output in nats a token.
    """

    policy: QuantizationPolicy
    room: Room
    final_bytes: int
    planned_bytes: int
    expected_loss: float
    rows: tuple[FitRow, ...]
    measured: Mapping[str, float] = field(default_factory=dict)

    def report(self) -> FitReport:
        """For a report; `policy` alone, in a file, is what `QuantizationPolicy.from_file` reads."""
        return FitReport(
            size=self.room.size,
            of=self.room.of,
            final_bytes=self.final_bytes,
            planned_bytes=self.planned_bytes,
            expected_loss=self.expected_loss,
            available_bytes=self.room.available_bytes,
            reserve_bytes=self.room.reserve_bytes,
            cache_bytes=self.room.cache_bytes,
            context=self.room.context,
            requests=self.room.requests,
            rows=[*self.rows],
            sensitivity=dict(self.measured),
            policy=asdict(self.policy)
            | {"ignore": [*self.policy.ignore], "overrides": [[*pair] for pair in self.policy.overrides]},
        )

    def to_dict(self) -> dict[str, Any]:
        """`report`, for JSON."""
        return asdict(self.report())

    def lines(self) -> Iterator[str]:
        """What was chosen, for people."""
        if self.room.available_bytes is not None:
            yield f"Fit: {format_bytes(self.room.size)}: {self.room}"
        planned, size = format_bytes(self.planned_bytes), format_bytes(self.room.size)
        yield f"Fit: {self.room.of} is planned to take {planned} of {size}"
        if all(row.scheme == AS_STORED for row in self.rows):
            yield "Fit: all modules stay as they are stored"
            return
        for row in self.rows:
            where = f"{row.kind}, {row.third} third of the layers" if row.third else row.kind
            yield f"Fit: {where}: {row.modules} {row.scheme}, {row.share_of_loss:.0%} of the expected loss"


@dataclass(frozen=True)
class Planned:
    """A draft with some policy, its final bytes, and those that are to stay below the size."""

    draft: Draft
    final_bytes: int
    nbytes: int


Plan = Callable[[QuantizationPolicy], Planned]


@contextmanager
def candidate() -> Iterator[None]:
    """Plan without a word in the log: what is to be said of a plan is said when it is made of what was chosen."""
    thread = threading.get_ident()

    def is_heard(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.ERROR

    logger.addFilter(is_heard)
    try:
        yield
    finally:
        logger.removeFilter(is_heard)


def fit_policy(
    model_id: str | Path | Checkpoint,
    size: str | int,
    *,
    device: str | torch.device = "auto",
    policy: QuantizationPolicy | None = None,
    options: LoadOptions | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    index: CheckpointIndex | None = None,
) -> Fitted:
    """The policy of the least expected loss whose load is planned to peak below `size`, such as "16GiB" or "auto".

    "auto" is what the machine, or the device, has free, less what `fit_context` and `fit_requests` of `options` say.
    Ignore patterns and overrides of `policy` count as they are. `index` has the tensors where they are known already.
    Raises `MemoryBudgetError` where not even the smallest schemes fit, and `PolicyError` for a checkpoint that is
    quantized already, or a policy that names schemes.
    """
    check_choosable("auto", policy)
    policy = policy or QuantizationPolicy()
    options = replace(options or LoadOptions(), fit=size, max_memory=None)
    told = without_fit(options)

    def plan(chosen: QuantizationPolicy) -> Planned:
        with candidate():
            draft = plan_draft(
                *(model_id, "auto"), device=device, policy=chosen, options=told, revision=revision,
                trust_remote_code=trust_remote_code, index=index,
            )  # fmt: skip
        memory = draft.plan.memory
        return Planned(draft, memory.final_bytes, memory.peak_bytes)

    names = [entry.name for entry in ENTRIES if entry.has_mode(policy.scale_mode)]
    first = plan(replace(policy, linear=ladder(names)[0]))
    check_choosable("auto", policy, first.draft.rules.is_quantized)
    schemes, vocabulary = ladder_of(first.draft, told), NO_VOCABULARY
    if options.fit_head:
        first, vocabulary = _with_vocabulary(first, policy, plan)
    return choose(
        *(policy, schemes, plan, lambda draft: _room(draft, options), options.fit_sensitivity), first=first,
        vocabulary=vocabulary,
    )  # fmt: skip


def _with_vocabulary(first: Planned, policy: QuantizationPolicy, plan: Plan) -> tuple[Planned, Vocabulary]:
    """A plan in which the head and the embedding have the scheme of all, as far as they can."""
    scheme, wanted = first.draft.rules.policy.linear, vocabulary_of(first.draft, policy)
    own = tuple((name, scheme) for name in wanted.names)
    planned = plan(replace(policy, linear=scheme, overrides=(*policy.overrides, *own)))
    found = as_planned(planned.draft, wanted)
    if found.names == wanted.names:
        return planned, found
    kept = [name for name in wanted.names if name not in found.names]
    logger.info("Fit: %s stay as they are stored: no scheme can be given to them", " and ".join(kept))
    if not found.names:
        return first, found
    own = tuple((name, scheme) for name in found.names)
    return plan(replace(policy, linear=scheme, overrides=(*policy.overrides, *own))), found


def apply_fit(
    model_id: str | Path | Checkpoint,
    quantization: str,
    policy: QuantizationPolicy | None,
    options: LoadOptions,
    *,
    device: str | torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    index: CheckpointIndex | None = None,
) -> tuple[QuantizationPolicy | None, LoadOptions, Fitted | None]:
    """What `options.fit` asks for: the policy it comes to, and options without it. Tells the log what was chosen."""
    if options.fit is None:
        return policy, options, None
    check_choosable(quantization, policy)
    found = fit_policy(
        *(model_id, options.fit), device=device, policy=policy, options=options, revision=revision,
        trust_remote_code=trust_remote_code, index=index,
    )  # fmt: skip
    tell(found)
    return found.policy, without_fit(options), found


def check_choosable(quantization: str, policy: QuantizationPolicy | None, is_quantized: bool = False) -> None:
    """Raise `PolicyError` where there is nothing to choose: schemes are named, or the checkpoint is quantized."""
    if quantization != "auto":
        raise PolicyError(f"fit chooses the schemes: leave out the quantization, which is {quantization!r}")
    if policy is not None and (policy.linear != "auto" or policy.experts is not None):
        raise PolicyError("fit chooses the schemes: give no scheme for linear layers or experts beside it")
    if is_quantized:
        raise PolicyError("fit chooses schemes for checkpoints in BF16, FP16 or FP32; this one is quantized already")


def tell(fitted: Fitted) -> None:
    """Say in the log what was chosen."""
    for line in fitted.lines():
        logger.info("%s", line)


def choose(
    policy: QuantizationPolicy,
    schemes: Sequence[str],
    plan: Plan,
    room_of: Callable[[Draft], Room],
    measured: Mapping[str, float] = NOTHING,
    sizes: Sizes | None = None,
    first: Planned | None = None,
    vocabulary: Vocabulary = NO_VOCABULARY,
) -> Fitted:
    """The policy of the least expected loss with some schemes, smallest first, whose plan stays below a size.

    `measured`, `sizes` and `vocabulary` are as in `choice_of`. `first` is planned with one of the schemes; where there
    is none, that is done with the smallest.
    """
    if first is None:
        first = plan(replace(policy, linear=schemes[0]))
        check_choosable("auto", policy, first.draft.rules.is_quantized)
    room = room_of(first.draft)
    choice = choice_of(first.draft, policy, schemes, measured=measured, sizes=sizes, vocabulary=vocabulary)
    chooser = _Chooser(choice, plan, room, first)
    tensors = len(first.draft.index.tensors)
    del first
    _collect(tensors)
    return chooser.chosen(measured)


def _room(draft: Draft, options: LoadOptions) -> Room:
    if options.fit == "auto":
        return free_room(draft, options)
    assert options.fit is not None
    return Room(options.fit)


class _Chooser:
    """Plans what is chosen, as what is held beside the weights differs from scheme to scheme: the plan is what counts.

    `first` is planned with one scheme for all modules.
    """

    def __init__(self, choice: Choice, plan: Plan, room: Room, first: Planned) -> None:
        self._choice, self._plan, self._room = choice, plan, room
        self._more = room.size - first.nbytes
        self._beside = first.draft.plan.memory.staging_bytes + LARGEST_DIFFERENCE
        self._known = {tuple([choice.planned] * len(choice.items)): (first.final_bytes, first.nbytes)}

    def chosen(self, measured: Mapping[str, float]) -> Fitted:
        """What is expected to lose least. Raises `MemoryBudgetError` where nothing fits."""
        choice = self._choice
        levels = self._best()
        for other in choice.uniform():
            if choice.loss(other) >= choice.loss(levels):
                break
            if choice.more(other) <= self._more + self._beside and self._planned(other)[1] <= self._room.size:
                levels = other
                break
        sizes = self._planned(levels)
        return Fitted(
            choice.as_policy(levels), self._room, *sizes, choice.loss(levels), tuple(choice.rows(levels)), measured
        )

    def _best(self) -> list[int]:
        """By steps; the smallest scheme for all, if no others are found that fit."""
        more = self._more
        for _ in range(MOST_TRIES):
            levels = self._choice.best(more)
            over = self._planned(levels)[1] - self._room.size
            if over <= 0:
                return levels
            if not any(levels):
                break
            more -= over
        least = self._choice.least
        if self._planned(least)[1] > self._room.size:
            self._refuse(self._plan(self._choice.as_policy(least)))
        return least

    def _refuse(self, least: Planned) -> NoReturn:
        """Say that not even the smallest fits, what it takes, and what would help."""
        memory, room = least.draft.plan.memory, self._room
        of_what, advice = "", room.advice(least.nbytes)
        if room.of == "the load":
            of_what = (
                f" (model {format_bytes(memory.final_bytes)} + staging {format_bytes(memory.staging_bytes)} + overhead "
                f"{format_bytes(memory.slack_bytes)})"
            )
            advice = [*smaller_staging(memory, least.nbytes - room.size), *advice]
        raise MemoryBudgetError(
            f"nothing fits: with all modules in {self._choice.schemes[0]}, the smallest, {room.of} is predicted to "
            f"take {format_bytes(least.nbytes)}{of_what}, and fit is {format_bytes(room.size)}{room.because}: "
            f"{'; or '.join(advice)}"
        )

    def _planned(self, levels: Sequence[int]) -> tuple[int, int]:
        """The bytes of a model in the end, and those that count against the size; the plan is let go of at once."""
        known = self._known.get(tuple(levels))
        if known is not None:
            return known
        planned = self._plan(self._choice.as_policy(levels))
        sizes = self._known[tuple(levels)] = planned.final_bytes, planned.nbytes
        tensors = len(planned.draft.index.tensors)
        del planned
        _collect(tensors)
        return sizes


def _collect(tensors: int) -> None:
    """Let go of a draft: modules and closures are in cycles, and the load is about to make another one as large."""
    if tensors >= MANY_TENSORS:
        gc.collect()
