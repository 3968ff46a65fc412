"""What is said where a checkpoint cannot be converted: which modules, why, and what would help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ..errors import PolicyError
from ..model.skeleton import Assignment
from ..schemes.exported.weights import ExportFormat

_SHOWN = 4
_KINDS = {"linear": "linear layers", "experts": "experts modules", "embedding": "embeddings"}
_EXPECTED = frozenset({"linear", "experts"})
"""What a model is expected to have; an embedding is there only where it was asked for."""
_IGNORE = "keep them with ignore patterns (--ignore), or choose another scheme for them (--override)"
_ANEW = (
    "convert writes what it quantizes itself, so name a scheme that quantizes anew all that is stored quantized, in "
    "another format than it has (-q SCHEME, or --override; --ignore does not help); what is to stay as it is stored "
    "needs no converting: load the checkpoint as it is"
)


def impossible(problems: Mapping[str, str], anew: Mapping[str, str], export: ExportFormat) -> PolicyError:
    """For modules that cannot be written, each with the reason; the weights of those in `anew` are stored quantized."""
    modules = {**anew, **problems}
    advice = [text for text, named in ((_IGNORE, problems), (_ANEW, anew)) if named]
    return PolicyError(
        f"{len(modules)} modules cannot be written as {export.name}: "
        f"{_listed(f'{module}: {why}' for module, why in modules.items())}; {'; '.join(advice)}"
    )


def nothing_quantized(assignments: Iterable[Assignment]) -> PolicyError:
    """For a model of which every module is kept, each with the reason."""
    reasons = Counter((each.kind, each.reason) for each in assignments)
    kept = [f"{_KINDS[kind]}: {reason} ({count})" for (kind, reason), count in reasons.most_common()]
    absent = [
        f"the model has no {called}"
        for kind, called in _KINDS.items()
        if kind in _EXPECTED and all(kind != own for own, _ in reasons)
    ]
    return PolicyError(
        f"no module would be quantized, and convert writes quantized checkpoints: {_listed(absent + kept)}; choose a "
        f"scheme for what the model has (-q, --experts, --override), or ignore less (--ignore); what is to stay as it "
        f"is stored needs no converting"
    )


def _listed(problems: Iterable[str]) -> str:
    """The first few of them."""
    every = list(problems)
    more = f"; and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return f"{'; '.join(every[:_SHOWN])}{more}"
