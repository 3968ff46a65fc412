"""Everything quantload raises on purpose.

QuantloadError
├── CheckpointError                 the files on disk, config.json and the index included
│   ├── ModelNotFoundError          what was given for the model is none: no such folder, repository or address
│   ├── TruncatedShardError         a shard is shorter than its header says, or shrank while it was read
│   ├── ChangedFileError            a file is not the one it was when the load began to read it
│   ├── CorruptHeaderError          a safetensors header breaks a rule of the format
│   ├── MissingShardError           the index names a file that is not there
│   ├── UnsafePathError             the index names a path outside the checkpoint folder
│   ├── NonFiniteWeightError        a weight is NaN or infinite; one that is kept as stored, in strict mode
│   └── DamagedEntryError           an entry of the cache is not what was written; a load goes on without it
├── RouteError                      checkpoint tensors and model parameters do not match
│   ├── MissingWeightsError         parameters, or regions of them, that nothing filled
│   ├── UnexpectedWeightsError      checkpoint tensors with no parameter to go to
│   ├── ShapeMismatchError          a tensor has another shape than its parameter
│   └── RepeatedRegionError         a region arrived twice without a reload being announced
├── PolicyError                     what to quantize, and how
│   ├── UnknownSchemeError          a scheme name that is not registered; the message lists those that are
│   ├── UnmatchedPatternError       an ignore or override pattern that matches nothing, in strict mode
│   └── UnappliedOptionError        a scheme, pattern or option that changes nothing, in strict mode
├── MemoryBudgetError               the plan needs more memory than allowed: need, limit, what to change
├── NoKernelError                   no kernel can serve; the message gives every candidate with its reason
├── QuantizedWeightError            code takes the codes of a quantized weight for numbers; names the layer to keep
├── UnsupportedCheckpointError      pickle files, an unknown quant_method
├── IncompleteModelError            a reload has failed part-way, and the model is used before another has repaired it
├── OutputError                     what is to be written: the folder exists, the disk is full
├── RankError                   another process that the model is divided among failed, or ended
└── LoadCancelledError              the load was cancelled before it finished

Every message says what was given, what was expected and what to do about it.
"""

from __future__ import annotations

LONGEST_MESSAGE = 4000
"""Characters of a message; what a checkpoint says may be longer than what anybody wants to read of it."""
_BEGINNING, _END = 2800, 1000


class QuantloadError(Exception):
    """Base of every error quantload raises on purpose; the middle of a very long message is left out.

    `attempt` is what a load had done when it ended with this error, a `memory.attempt.Attempt`; None where none had
    begun.
    """

    attempt: object | None = None

    def __init__(self, message: str = "", *more: object) -> None:
        if len(message) > LONGEST_MESSAGE:
            left_out = len(message) - _BEGINNING - _END
            message = f"{message[:_BEGINNING]} [... {left_out:,} characters ...] {message[-_END:]}"
        super().__init__(message, *more)


class CheckpointError(QuantloadError):
    """The checkpoint on disk is wrong: a shard, the index or `config.json`."""


class ModelNotFoundError(CheckpointError):
    """What was given for the model is none: it is not there, cannot be reached, or is something else."""


class TruncatedShardError(CheckpointError):
    """A shard is shorter than its header says, or shrank while it was being read."""


class ChangedFileError(CheckpointError):
    """A file of the checkpoint was written to, replaced or removed while it was read; nothing is made of it."""


class CorruptHeaderError(CheckpointError):
    """A safetensors header breaks a rule of the format."""


class MissingShardError(CheckpointError):
    """The index names a shard that is not there."""


class UnsafePathError(CheckpointError):
    """The index names a path that leaves the checkpoint folder."""


class NonFiniteWeightError(CheckpointError):
    """A weight is NaN or infinite; `position` is its (row, column) in the piece that held it, `advice` what to do.

    `advice` is None for a weight that is to be quantized: `leave_as_stored` says it of the layer.
    """

    position: tuple[int, int] | None = None
    advice: str | None = None

    @staticmethod
    def leave_as_stored(parameter: str) -> str:
        """What to do about a weight that is to be quantized and goes to a parameter of that name."""
        return NonFiniteWeightError.leave_module(parameter.rpartition(".")[0] or parameter)

    @staticmethod
    def leave_module(name: str) -> str:
        """What to do about a weight of a module of that name that is to be quantized."""
        return (
            "weights to be quantized must be finite: repair the checkpoint, or leave this layer as stored with "
            f"--ignore '{name}'"
        )


class DamagedEntryError(CheckpointError):
    """An entry of the cache is not what was written; a load notices, warns and reads the checkpoint instead."""


class RouteError(QuantloadError):
    """Checkpoint tensors and model parameters do not match."""


class MissingWeightsError(RouteError):
    """Parameters, or regions of them, that no checkpoint tensor filled."""


class UnexpectedWeightsError(RouteError):
    """Checkpoint tensors that no parameter takes."""


class ShapeMismatchError(RouteError):
    """A checkpoint tensor has another shape than the parameter it goes to."""


class RepeatedRegionError(RouteError):
    """A region of a parameter arrived twice without a reload being announced."""


class PolicyError(QuantloadError):
    """The quantization policy or an option cannot be carried out."""


class UnknownSchemeError(PolicyError):
    """A scheme name that is not registered."""


class UnmatchedPatternError(PolicyError):
    """An ignore or override pattern matched no module, in strict mode."""


class UnappliedOptionError(PolicyError):
    """A scheme, a pattern or an option of a load changes nothing, in strict mode; the message says why."""


class MemoryBudgetError(QuantloadError):
    """The load would need more memory than the limit the user set."""


class NoKernelError(QuantloadError):
    """No kernel can serve an operation on this device."""


class QuantizedWeightError(QuantloadError):
    """Code takes the codes of a quantized weight for numbers.

    No `TypeError`: torch makes one of those, raised inside of an operator, say that the operator does not exist.
    """


class UnsupportedCheckpointError(QuantloadError):
    """A kind of checkpoint quantload does not read, such as pickle files."""


class IncompleteModelError(QuantloadError):
    """A model is used that a reload has given a part of its new weights only."""


class OutputError(QuantloadError):
    """A checkpoint cannot be written where it is to be."""


class RankError(QuantloadError):
    """Another rank, a process that the model is divided among, failed or ended; the message says which, and why."""


class LoadCancelledError(QuantloadError):
    """The load was cancelled before it finished."""
