"""Groups of options that say which model it is, and what becomes of its modules."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PolicyError
from ..options import ScaleMode
from ..ranks.launch import launched
from ..schemes.names import SCHEME_NAMES
from .load_options import option_pair

if TYPE_CHECKING:
    from ..options import QuantizationPolicy


def complete_scheme(incomplete: str) -> list[str]:
    """The scheme names that begin with what was typed, for the shell."""
    return [name for name in SCHEME_NAMES if name.startswith(incomplete.lower())]


@dataclass(frozen=True)
class PolicyOptions:
    """Which module gets which scheme."""

    experts: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            autocompletion=complete_scheme,
            help="Scheme for the experts of MoE layers.",
            show_default="that of --quantization",
        ),
    ] = None
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave these modules as stored: a name, a glob, or re: and a regular expression for the whole name. "
            "Repeatable.",
            show_default="no module",
        ),
    ] = None
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SCHEME",
            help="Scheme for some modules, whatever else says they are left as stored; the first pattern that fits "
            "counts. Repeatable.",
            show_default="no module",
        ),
    ] = None
    no_default_ignore: Annotated[
        bool,
        typer.Option(
            "--no-default-ignore",
            help="Quantize output head, embeddings, routers and gates too, which are left as stored without it.",
        ),
    ] = False
    scale_mode: Annotated[
        ScaleMode,
        typer.Option(
            help="How scales are chosen. default: by the rule of the scheme. mse: for the least squared error of each "
            "block, for MX schemes, nvfp4 and int4_per_group only.",
        ),
    ] = "default"

    policy_file: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            metavar="FILE",
            help="All of this from a JSON or TOML file of the fields of a QuantizationPolicy, as plan --save-policy "
            "writes it.",
            show_default="no file",
        ),
    ] = None

    def policy(self) -> QuantizationPolicy | None:
        """The policy, `None` where nothing was said."""
        from ..options import QuantizationPolicy

        if self == PolicyOptions():
            return None
        if self.policy_file is not None:
            if replace(self, policy_file=None) != PolicyOptions():
                raise PolicyError("--policy says which module gets which scheme: give no other option for that")
            return QuantizationPolicy.from_file(self.policy_file)
        overrides = [option_pair(text, "--override", "PATTERN=SCHEME") for text in self.override or ()]
        return QuantizationPolicy(
            experts=self.experts,
            ignore=tuple(self.ignore or ()),
            overrides=tuple(overrides),
            default_ignore=not self.no_default_ignore,
            scale_mode=self.scale_mode,
        )


@dataclass(frozen=True)
class SourceOptions:
    """Where the checkpoint comes from."""

    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default="the hub's default branch")
    ] = None
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read a hub id where it is, in ranges, instead of downloading it first: the same as hf:// before it.",
        ),
    ] = False
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run modeling code that the checkpoint ships; it is never run without this."
        ),
    ] = False

    def address(self, model: str) -> str:
        """What stands for a model. Raises `PolicyError` for --stream with what is no hub id."""
        if not self.stream or model.lower().startswith("hf://"):
            return model
        if "://" in model or os.path.lexists(model) or model.count("/") != 1:
            raise PolicyError(f"--stream is for hub ids (owner/name), and MODEL is {model!r}")
        return f"hf://{model}"

    def values(self) -> dict[str, Any]:
        """Arguments of `load_quantized` and its like."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class RankOptions:
    """How torchrun's processes divide a model."""

    expert_parallel: Annotated[
        bool,
        typer.Option(
            "--expert-parallel",
            help="Under torchrun: let each rank have whole experts, instead of a part of each.",
        ),
    ] = False

    def values(self) -> dict[str, Any]:
        """Arguments of `load_quantized`. Raises `PolicyError` for what one process has nobody to share with."""
        if launched().ranks == 1:
            if self.expert_parallel:
                raise PolicyError(
                    "--expert-parallel is given to one process; start several with torchrun --nproc-per-node N -m "
                    "quantload"
                )
            return {}
        return {"tp": "auto", "expert_parallel": self.expert_parallel}
