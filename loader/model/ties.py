"""Which of some tied parameters the others get their values from: the one that the checkpoint has."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn


def tied_to_what_is_there(ties: Mapping[str, str], there: Collection[str]) -> dict[str, str]:
    """The same ties, each parameter by the one whose values it gets, so that one in `there` is the last in every group.

    `ties` say of a parameter which one it shares its values with, as a model class declares it; a checkpoint may have
    any of a group, as a file that stores shared memory once keeps the name it comes to first. What transformers makes
    of it while it ties, one pair after the other in their order, is known here before anything is read. Two of a group
    that are both there stay a pair: whether they are equal is seen once they have been read.
    """
    filled = {*there}
    settled: dict[str, str] = {}
    for target, source in ties.items():
        if source in filled:
            settled.setdefault(target, source)
        elif target in filled:
            settled.setdefault(source, target)
            filled.add(source)
        else:
            other = next((name for name in _group(ties, target) if name in filled), source)
            settled.setdefault(target, other)
            if other in filled:
                filled.add(target)
    return settled


def shared_from_the_start(model: nn.Module) -> dict[str, str]:
    """Names of parameters that a model has under another name before: of a module in two places, or given to two.

    The code of a model may share so without saying it; a checkpoint has one of the names.
    """
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(path, recurse=False):
            known = first.setdefault(id(parameter), name)
            if known != name:
                shared[name] = known
    return shared


def _group(ties: Mapping[str, str], name: str) -> list[str]:
    """Everything that is tied to a parameter, over any number of others, in the order of the ties."""
    group = {name}
    while True:
        more = {each for pair in ties.items() if group & {*pair} for each in pair}
        if more <= group:
            return [each for pair in ties.items() for each in pair if each in group]
        group |= more
