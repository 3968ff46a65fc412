"""What each error means and what to do about it: for the page of a failed load, and the list in the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """What an error means in a sentence, and what to do, in the order in which to try it."""

    means: str
    steps: tuple[str, ...]


_FETCH_AGAIN = "Fetch the checkpoint again, and compare the sizes and hashes of its files with the source."

ADVICE: dict[str, Advice] = {
    "MemoryBudgetError": Advice(
        "The load would take more memory than is allowed, or than there is.",
        (
            "Read in the message what is missing and which schemes would fit; `quantload plan MODEL -q SCHEME` says it "
            "of any scheme from the headers alone.",
            "Choose a narrower scheme with -q, or make the arena smaller with --staging.",
            "End what else holds memory, or raise --max-memory if the limit was yours.",
        ),
    ),
    "TruncatedShardError": Advice(
        "A file of the checkpoint is shorter than its header says: a download or a copy has not come to its end.",
        (_FETCH_AGAIN, "If something is still writing it, wait for it and load again."),
    ),
    "ChangedFileError": Advice(
        "A file of the checkpoint was written to or replaced while it was read; nothing was made of it.",
        ("Find out what writes to this folder, a download or a job that trains, and load when it is done.",),
    ),
    "CorruptHeaderError": Advice(
        "A safetensors header breaks a rule of the format: the file is damaged, or no safetensors file.",
        (_FETCH_AGAIN,),
    ),
    "MissingShardError": Advice(
        "The index names a file that is not there.",
        ("Fetch the missing file that the message names into the folder of the checkpoint.",),
    ),
    "UnsafePathError": Advice(
        "The index names a path outside of the folder of the checkpoint, which no honest tool writes.",
        ("Do not use this checkpoint unless you know who wrote the index, and why.",),
    ),
    "NonFiniteWeightError": Advice(
        "A weight that was to be quantized is NaN or infinite.",
        (
            "Compare the file with its source: a damaged one often has such values.",
            "If the model really has them, leave that layer as stored: --ignore NAME with the name from the message.",
        ),
    ),
    "DamagedEntryError": Advice(
        "An entry of the cache is not what was written.",
        ("Remove the entry that the message names; the next load writes it anew.", "Look at the disk: is it failing?"),
    ),
    "CheckpointError": Advice(
        "The checkpoint on disk is not complete or not as it should be.",
        ("Look at the file that the message names.", _FETCH_AGAIN),
    ),
    "MissingWeightsError": Advice(
        "The model has parameters that the checkpoint has no values for.",
        (
            "Is it the checkpoint of this model class? `architectures` in config.json says which class is built.",
            "Are all shards there? The index names them.",
        ),
    ),
    "UnexpectedWeightsError": Advice(
        "The checkpoint has tensors that the model does not know, and --strict makes that an error.",
        ("Load without --strict to leave them out, or find out which version of the model they belong to.",),
    ),
    "ShapeMismatchError": Advice(
        "A tensor has another shape than the parameter it goes to.",
        ("Compare config.json with the checkpoint: sizes, number of experts, size of the vocabulary.",),
    ),
    "RepeatedRegionError": Advice(
        "The same part of a parameter arrived twice.",
        (
            "If an engine hands the weights over: announce a reload before handing a layer over again.",
            "Otherwise please report it, with the names in the message.",
        ),
    ),
    "RouteError": Advice(
        "Tensors of the checkpoint and parameters of the model do not match.",
        ("Is config.json that of this checkpoint, and transformers new enough for the model?",),
    ),
    "UnknownSchemeError": Advice("There is no scheme of that name.", ("`quantload schemes` lists those there are.",)),
    "UnmatchedPatternError": Advice(
        "A pattern matches no module, and --strict makes that an error.",
        ("`quantload plan MODEL --json` lists the names of all modules; correct the pattern.",),
    ),
    "UnappliedOptionError": Advice(
        "Something that was asked for changes nothing, and --strict makes that an error.",
        ("Leave out the option that the message names, or load without --strict.",),
    ),
    "PolicyError": Advice(
        "An option, or what is to be quantized how, cannot be carried out.",
        ("Change what the message names; `quantload load --help` says what each option takes.",),
    ),
    "NoKernelError": Advice(
        "Nothing can compute with this scheme on this device.",
        ("The message says why of each kernel: choose another scheme, --device cpu, or another --kernel.",),
    ),
    "QuantizedWeightError": Advice(
        "Code of the model takes the codes of a quantized weight for numbers.",
        ("Leave the layer that the message names as stored: --ignore NAME.",),
    ),
    "UnsupportedCheckpointError": Advice(
        "quantload does not read this kind of checkpoint.",
        (
            "Convert pickled weights to safetensors with the tool that made them, or find a repository that has them.",
            "For a quantized checkpoint of an unknown kind, load the one it was made of.",
        ),
    ),
    "IncompleteModelError": Advice(
        "A reload has failed part-way, and the model holds weights of two checkpoints.",
        ("Reload it once more, from either checkpoint, or load it anew.",),
    ),
    "OutputError": Advice(
        "What is to be written cannot be: the folder exists, or the disk is full.",
        ("Give another folder, or make room. A conversion that was interrupted goes on where it was.",),
    ),
    "RankError": Advice(
        "A process that loads another part of the model has failed, or is no longer there.",
        ("Look for the first error in the logs of all processes: the others end because of it.",),
    ),
    "LoadCancelledError": Advice("The load was cancelled before it finished.", ("Start it again when you need it.",)),
    "QuantloadError": Advice("The load ended with an error.", ("Read the message, which says what to do.",)),
    "OSError": Advice(
        "The system refused a file or a connection.",
        ("Look at the name in the message: does it exist, and may you read it? Is the network there?",),
    ),
    "KeyboardInterrupt": Advice("The load was interrupted.", ("Start it again when you need it.",)),
}
UNEXPECTED = Advice(
    "Something happened that quantload does not expect.",
    ("Please report it, with this page and what the command printed.", "-v logs more while it loads."),
)


def advice_for(types: Iterable[str]) -> Advice:
    """The advice for an error by the names of its classes, its own first."""
    return next((ADVICE[name] for name in types if name in ADVICE), UNEXPECTED)
