"""What `load_quantized` returns, for type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from transformers import GenerationMixin

    from .memory.planner import MemoryPlan
    from .memory.report import LoadReport
    from .reload.settings import LoadSettings

    class QuantizedModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers' classes are not typed
        """The transformers model of a checkpoint and what its load says; at run time it is of the model's class."""

        load_report: LoadReport
        load_plan: MemoryPlan
        load_settings: LoadSettings

else:
    QuantizedModel = PreTrainedModel
