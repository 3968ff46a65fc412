"""New weights for a model from tensors that its caller hands over: all of them, or some, in any order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..checkpoint.reader import ReadTotals
from ..errors import LoadCancelledError, MissingWeightsError, PolicyError, RankError
from ..geometry.regions import RegionTracker
from ..interrupts import interrupt_kept
from ..memory.budget import memory_running_out
from ..memory.report import LayerReport, LoadReport
from ..model import transformers_api
from ..model.leftovers import some
from ..online.weight_loader import OnlineWeightLoader
from ..plan import loaded_parameters
from ..quantized_model import QuantizedModel
from ..ranks.alone import RankSizes
from ..recording import Recorder, tensor_bytes
from .adapters import LoraAdapter, check_undivided, merge_adapter
from .alone import alone
from .arriving import Arrivals
from .layers import OpenLayers, scales_reach_over_rows
from .living import HeldStorage, Regions, allow_forward, bind, broken_regions, refuse_forward
from .shared import Twins, fill_tied, shared_pairs, ties
from .values import draft_values

Given = tuple[str, Tensor] | tuple[str, Tensor, Sequence[int]]
"""A tensor with its name in the checkpoint that the model was loaded from, or in the model; for a part of one, also the
index of its first element."""


GIVEN_UP = "an update was given up before it was finished"


class WeightUpdate:
    """An update of a model's weights that is announced, brought in any number of steps, and finished.

    With `partial`, what does not come stays as it is; without, `finish` raises for it. To what comes, `adapter` is
    added. From the first tensor on until `finish`, `model.load_report.state` is `incomplete` and the model's forward
    raises. Used as a context manager, it is given up where `finish` was not called. Not thread-safe, but its calls may
    come from different threads.

    The ranks of a model that is divided among them announce, bring and finish an update together: each gets the same
    tensors, of which those that are not its own may be left out, and for scales that ranks share in the same order.
    An update of theirs that fails leaves the model incomplete on all ranks, as none knows what others have written.
    """

    def __init__(
        self,
        model: QuantizedModel,
        *,
        partial: bool = False,
        adapter: LoraAdapter | None = None,
        label: str = "tensors handed over",
    ) -> None:
        self._model: Any = model
        self._adapter, self._adapted = adapter, set[str]()
        self._partial, self._label = partial, label
        self._held, self._is_open = contextlib.ExitStack(), False
        with contextlib.ExitStack() as held:
            self._settings = held.enter_context(alone(model))
            self._ranks = self._settings.ranks
            check_undivided(adapter, self._ranks)
            if self._settings.is_kept_as_stored:
                raise PolicyError(
                    "the model has weights as its quantized checkpoint stores them, which are not made of values; "
                    "reload it from a checkpoint like that one"
                )
            held.enter_context(self._ranks.loading())
            self._begin(held)
            self._ranks.any("planned", True)  # nobody begins to write before all of them can
            self._held, self._is_open = held.pop_all(), True

    def _begin(self, held: contextlib.ExitStack) -> None:
        model, settings = self._model, self._settings
        device = next(model.parameters()).device
        self._recorder = held.enter_context(Recorder(device, settings.options.stats, None, "reload"))
        self._layers = OpenLayers(self._recorder.on_layer, self._partial)
        with _calm():
            draft = draft_values(model, settings, HeldStorage(device), self._layers.on_layer, self._label)
            bind(draft.model, model, draft.loaders)
        self._draft = draft
        if self._adapter is not None:
            self._adapted = merge_adapter(self._adapter, draft.loaders, draft.routes, dict(ties(draft.model)))
        self._layers.expect(draft.assignments)
        self._recorder.expect(draft.plan, draft.assignments)
        self._twins = Twins(shared_pairs(draft.model, model, draft.loaders.sinks), draft.loaders.sinks)
        self._arrivals = Arrivals(draft, settings.options, settings.unused, self._twins, self._touch)
        self._broken_before = broken_regions(model)
        self._is_marked = False

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the largest piece that is quantized at once."""
        return self._settings.options.chunk_bytes

    def wants(self, name: str) -> bool:
        """Whether this rank has something of a tensor of the checkpoint."""
        return self._arrivals.wants(name)

    def load(self, tensors: Iterable[Given] | Mapping[str, Tensor]) -> None:
        """Quantize tensors as they come; those that came before are replaced.

        `tensors` may be iterated twice where it can be: then nothing has to be held for scales that tensors share.
        What is handed over may be overwritten once the next is asked for. Whatever is raised gives the update up.
        """
        given: Iterable[Given] = tensors.items() if isinstance(tensors, Mapping) else tensors
        self._check_open()
        with self._giving_up(), _calm():
            self._ranks.check()
            if iter(given) is not given and scales_reach_over_rows(self._draft.loaders.sinks.values()):
                self._arrivals.first_pass(_parts(given))
            for name, tensor, start in _parts(given):
                self._ranks.check()
                self._arrivals.take(name, tensor, start)
                self._recorder.on_bytes(self._arrivals.bytes)

    def finish(self) -> LoadReport:
        """End the update; returns the report, which is `model.load_report` now.

        Raises `MissingWeightsError` for what has not come: of tensors that came in part, of those that get one scale
        with one that came, and of all others unless the update is partial.
        """
        self._check_open()
        with self._giving_up(), _calm(), self._ranks.quiet():
            self._twins.fill()
            self._check()
            self._layers.close()
            report = self._report()
            broken = self._still_broken()
            is_broken = self._ranks.any("broken", broken is None or bool(broken))
            self._is_open = False
            self._held.close()
        self._is_marked = False
        allow_forward(self._model)
        self._model.load_report = report
        if is_broken:
            left = "all of it" if broken is None else some(broken) if broken else "what another rank lacks"
            refuse_forward(
                self._model, f"an update before this one had failed, and this one did not bring {left}", broken
            )
        return report

    def abort(self) -> None:
        """Give the update up: what was written stays, and the model is incomplete."""
        if self._is_open:
            with contextlib.suppress(LoadCancelledError, RankError), self._giving_up():
                raise LoadCancelledError(GIVEN_UP)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _check_open(self) -> None:
        """Raise `PolicyError` for an update that has come to its end."""
        if not self._is_open:
            raise PolicyError("this update of weights was finished, has failed or was given up: begin another one")

    def _touch(self, parameter: str) -> None:
        """Something is about to be written to a parameter."""
        if not self._is_marked:
            self._is_marked = True
            self._mark("an update has begun and is not finished")
        self._layers.touch(parameter)

    def _mark(self, reason: str) -> None:
        before = self._broken_before
        broken: Regions | None = None
        if before is not None and (self._partial or not self._is_marked):
            broken = {name: list(regions) for name, regions in before.items()}
            for name, regions in self._arrivals.regions().items():
                broken.setdefault(name, []).extend(regions)
        refuse_forward(self._model, reason, broken)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """What fails inside is the end of the update, also for other ranks, or because of one."""
        try:
            with self._ending():
                yield
        except BaseException as error:
            if self._is_marked or self._ranks.ranks > 1:
                self._mark(str(error) if isinstance(error, LoadCancelledError) else f"an update failed: {error}")
                self._is_marked = False
            raise

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """What fails inside ends what the update runs in."""
        try:
            yield
        except BaseException:
            self._is_open = False
            with self._held:
                raise

    def _check(self) -> None:
        """Raise `MissingWeightsError` for what has to come and has not."""
        without = self._adapted - self._arrivals.regions().keys()
        if without:
            raise MissingWeightsError(f"an adapter was given without the weights it is added to: {some(without)}")
        waiting = self._arrivals.missing()
        if waiting:
            raise MissingWeightsError(f"{len(waiting)} tensors did not come whole: {some(waiting)} is missing")
        if self._partial:
            return
        try:
            self._draft.loaders.check_complete(loaded_parameters(self._draft.mapped, self._draft.loaders))
        except MissingWeightsError as error:
            absent = self._arrivals.absent(self._settings.tensors)
            raise MissingWeightsError(
                f"{len(absent)} tensors of a full update did not come: {some(absent)} ({error})"
            ) from None

    def _report(self) -> LoadReport:
        model, draft, old = self._model, self._draft, self._model.load_report
        fill_tied(draft.model, model, draft.mapped.missing)
        totals = ReadTotals(self._arrivals.bytes, 0.0, 0)
        report = self._recorder.report(
            self._label, draft.rules.name, totals, tensor_bytes(model), tensor_bytes, None, draft.non_finite(),
            self._ranks.numbers,
        )  # fmt: skip
        sizes = RankSizes(totals.bytes_read, report.final_bytes, report.peak_bytes)
        all_sizes = self._ranks.reloaded(draft.rank_plan, model, sizes)
        if all_sizes:
            report.note_ranks(all_sizes, draft.replicated_bytes)
        if not self._partial:
            return report
        new = {layer.name: layer for layer in report.layers if layer.name in self._layers.finished}
        layers = [
            new.get(layer.name) or (_unmeasured(layer) if layer.name in self._layers.touched else layer)
            for layer in old.layers
        ]
        return replace(report, model=old.model, layers=layers)

    def _still_broken(self) -> Regions | None:
        """What an update before this one has left in any state, and this one has not brought."""
        if self._broken_before is None:
            return None if self._partial else {}
        sinks: Mapping[str, Any] = self._draft.loaders.sinks
        left: Regions = {}
        for name, regions in self._broken_before.items():
            tracker = _tracker(sinks[name])
            missing = [region for region in regions if not tracker.arrived(region)]
            if missing:
                left[name] = missing
        return left


def _parts(given: Iterable[Given]) -> Iterator[tuple[str, Tensor, Sequence[int] | None]]:
    for each in given:
        yield each[0], each[1].detach(), each[2] if len(each) == 3 else None


def _tracker(sink: Any) -> RegionTracker:
    tracker: RegionTracker = sink.parameter.tracker if isinstance(sink, OnlineWeightLoader) else sink.tracker
    return tracker


def _unmeasured(layer: LayerReport) -> LayerReport:
    """A layer of which some weights are new and some are not: nobody has seen all of them."""
    return replace(layer, sqnr_db=None, max_abs_error=None, amax=None, saturated_fraction=None, zero_fraction=None)


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """What a load runs in."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        transformers_api.on_cpu(),
        interrupt_kept(),
        memory_running_out([]),
    ):
        yield
