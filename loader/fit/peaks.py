"""What a load would take with the other schemes: from the shapes of a draft, without making another one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..draft import Draft
from ..errors import NoKernelError, PolicyError, UnsupportedCheckpointError
from ..geometry.layout import WeightLayout
from ..memory.verdict import SchemePeak
from ..model.experts import convert_experts
from ..model.skeleton import Assignment
from ..options import LoadOptions
from ..schemes.base import LinearScheme, MoEScheme
from ..schemes.names import AUTO
from ..schemes.policy import Choice, Policy
from ..schemes.registry import AS_STORED, ENTRIES, SchemeFactory


def scheme_peaks(draft: Draft, options: LoadOptions, stored: bool = False) -> list[SchemePeak]:
    """The peaks with every other scheme in place of those of linear layers and experts; the other rules stay.

    `stored`: also with none, of a checkpoint that is not quantized.

    The bytes of the model are exact, what is held beside it is taken to be the same. Schemes that the load could not
    be done with are left out.
    """
    return list(_peaks(draft, options, stored))


def _peaks(draft: Draft, options: LoadOptions, stored: bool) -> Iterator[SchemePeak]:
    rules, plan = draft.rules, draft.plan.memory
    for entry in ENTRIES:
        if entry.name == rules.policy.linear or (entry.name == AS_STORED and not (stored or rules.is_quantized)):
            continue
        factory = SchemeFactory(draft.schemes.device, options, rules.policy.scale_mode)
        try:
            other = rules.with_scheme(entry.name, factory)
            possible = [each for each in draft.assignments if each.is_possible]
            more = sum(bytes_with(draft, each, other) - bytes_now(draft, each) for each in possible)
        except (PolicyError, NoKernelError, UnsupportedCheckpointError):
            continue
        name = AUTO if entry.name == AS_STORED and rules.is_quantized else entry.name
        yield SchemePeak(name, plan.final_bytes + more, plan.peak_bytes + more)


def bytes_now(draft: Draft, assignment: Assignment) -> int:
    """What the weights of a module take as they are planned, in bytes."""
    return sum(sum(draft.loaders.sinks[name].sizes) for name in _loaded(draft, _weights(assignment)))


def bytes_with(draft: Draft, assignment: Assignment, other: Policy) -> int:
    """What the weights of a module would take by other rules, in bytes."""
    weights = _weights(assignment)
    names = _loaded(draft, weights)
    choice = _choice(draft, assignment, weights, other)
    if choice.scheme is None:
        return sum(draft.mapped.shapes.tensors[name].nbytes for name in names)
    layouts = _layouts(assignment, choice.scheme)
    return sum(layouts[name.rpartition(".")[2]].nbytes for name in names)


def _loaded(draft: Draft, weights: list[str]) -> list[str]:
    """Those of some parameters that the checkpoint has and the load fills."""
    return [name for name in weights if name in draft.loaders.sinks and name not in draft.mapped.missing]


def _choice(draft: Draft, assignment: Assignment, weights: list[str], other: Policy) -> Choice:
    if assignment.kind in ("linear", "embedding"):
        return other.linear(assignment.name, assignment.role, draft.sources.linear(weights[0]))
    return other.experts(assignment.name, None, draft.sources.module(weights))


def _weights(assignment: Assignment) -> list[str]:
    """The parameters of a module that are quantized, or could be."""
    if assignment.scheme is not None:
        keys = list(assignment.scheme.layouts(assignment.module))
    elif assignment.kind in ("linear", "embedding"):
        keys = ["weight"]
    else:
        keys = [key for key, parameter in assignment.module.named_parameters(recurse=False) if parameter.dim() == 3]
    return [f"{assignment.name}.{key}" for key in keys]


def _layouts(assignment: Assignment, scheme: LinearScheme | MoEScheme) -> dict[str, WeightLayout]:
    """The layouts that the weights of a module would have in a scheme."""
    module: Any = assignment.module
    if assignment.scheme is not None:
        found = assignment.scheme.layouts(module)
        multiples = scheme.multiples(module)
        return {
            key: replace(layout, format=scheme.kernels.format, multiples=multiples) for key, layout in found.items()
        }
    shell: Any = nn.Module()
    if isinstance(scheme, LinearScheme):
        rows, columns = (
            module.weight.shape if isinstance(module, nn.Linear | nn.Embedding) else reversed(module.weight.shape)
        )
        scheme.create_weights(shell, shards=(("", int(rows)),), in_features=int(columns))
    else:
        shell = copy.copy(module)  # the module itself stays as it is
        shell._parameters = dict(module._parameters)
        convert_experts(shell, scheme)
    return scheme.layouts(shell)
