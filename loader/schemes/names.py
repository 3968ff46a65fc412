"""The names of schemes, without torch: a wrong one is an error before anything is imported for a load."""

from __future__ import annotations

import difflib
from typing import Literal, get_args

from ..errors import UnknownSchemeError

AUTO = "auto"

SchemeName = Literal[
    "auto", "quark_mxfp4", "mxfp4", "mxfp4_rows", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "fp8_per_tensor",
    "fp8_per_channel", "ptpc_fp8", "fp8_per_block", "nvfp4", "nl4", "int8_per_channel", "int8", "experts_int8",
    "int4_per_group", "int4", "quark_int4fp8_moe", "none",
]  # fmt: skip
"""Every name that `quantization` takes; see `aliases_of` for those that are other names of a scheme."""

ExportName = Literal["quark", "compressed-tensors", "modelopt", "mxfp4", "quantload"]
"""The formats of checkpoints that `convert` writes."""

SCHEME_NAMES: tuple[str, ...] = get_args(SchemeName)

ALIASES = {"mxfp4": "quark_mxfp4", "ptpc_fp8": "fp8_per_channel", "int8": "int8_per_channel", "int4": "int4_per_group"}
"""Names that other tools use, where they can mean one scheme only."""

_SEVERAL = {
    "fp8": ("fp8_per_channel", "fp8_per_tensor", "fp8_per_block"),
    "mxfp6": ("mxfp6_e2m3", "mxfp6_e3m2"),
    "mx": ("quark_mxfp4", "mxfp6_e3m2", "mxfp8"),
    "awq": ("int4_per_group",), "gptq": ("int4_per_group",), "w4a16": ("int4_per_group",),
    "nf4": ("nl4", "int4_per_group"), "iq4_nl": ("nl4",),
    "w8a8": ("int8_per_channel", "fp8_per_channel"), "bitsandbytes": ("int8_per_channel", "int4_per_group"),
    "fp4": ("quark_mxfp4", "nvfp4"), "quark": ("quark_mxfp4", "quark_int4fp8_moe"), "modelopt": ("nvfp4",),
    "bf16": ("none",), "fp16": ("none",),
}  # fmt: skip
"""What people may mean who use a name of a family of formats, or of another method."""

_FAMILIES = ("mxfp4", "mxfp6", "mxfp8", "nvfp4", "fp8", "int8", "int4")


def aliases_of(name: str) -> tuple[str, ...]:
    """The other names of a scheme."""
    return tuple(alias for alias, scheme in ALIASES.items() if scheme == name)


def known_name(name: object) -> str:
    """A name as it is registered: any case, `-` for `_`; `UnknownSchemeError` says what could have been meant."""
    if isinstance(name, str):
        spelled = name.strip().lower().replace("-", "_")
        if spelled in SCHEME_NAMES:
            return spelled
        near = _SEVERAL.get(spelled) or _near(spelled)
        if near:
            raise UnknownSchemeError(
                f"unknown scheme {name!r}; did you mean {' or '.join(near)}? There are {', '.join(SCHEME_NAMES)}"
            )
    raise UnknownSchemeError(f"unknown scheme {name!r}; choose one of {', '.join(SCHEME_NAMES)}")


def _near(spelled: str) -> tuple[str, ...]:
    """The names that are spelled nearly so, or whose first part is in it."""
    close = difflib.get_close_matches(spelled, SCHEME_NAMES, n=2, cutoff=0.8)
    family = next((each for each in _FAMILIES if each in spelled), None)
    if close or family is None:
        return tuple(close)
    return tuple(name for name in SCHEME_NAMES if family in name and name not in ALIASES and "experts" not in name)
