"""What a load would do, asked for by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .checkpoint.folder import Checkpoint
from .draft import Draft, plan_draft
from .fit.policy import Fitted, apply_fit
from .fit.warning import warn_of_schemes
from .options import LoadOptions, QuantizationPolicy, check_kinds, with_fit
from .schemes.names import SchemeName


def plan_quantized(
    model_id: str | Path | Checkpoint,
    quantization: SchemeName | str = "auto",
    *,
    fit: int | str | None = None,
    device: str | torch.device = "auto",
    policy: QuantizationPolicy | None = None,
    options: LoadOptions | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Draft:
    """What `load_quantized` would do with the same arguments: modules, schemes and memory, no weight read.

    `.plan.memory` is the prediction. Raises what `load_quantized` would raise up to there, the budget included.
    """
    check_kinds(policy, options)
    return plan_fitted(
        model_id,
        quantization,
        device=device,
        policy=policy,
        options=with_fit(options, fit),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )[0]


def plan_fitted(
    model_id: str | Path | Checkpoint,
    quantization: str,
    *,
    device: str | torch.device,
    policy: QuantizationPolicy | None,
    options: LoadOptions,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[Draft, Fitted | None]:
    """`plan_quantized`, and what was chosen where schemes were to be."""
    where: dict[str, Any] = {"device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    policy, options, fitted = apply_fit(model_id, quantization, policy, options, **where)
    draft = plan_draft(model_id, quantization, policy=policy, options=options, **where)
    warn_of_schemes(draft)
    return draft, fitted
