"""What each error means and what to do about it: for the page of a failed load, and the list in the documentation."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Something to do, for a load that was given the option `given`, or none of `without`, where it says so."""

    do: str
    given: str | None = None
    without: tuple[str, ...] = ()

    def applies(self, options: Collection[str]) -> bool:
        """Whether it is for a load with these options."""
        return (self.given is None or self.given in options) and not any(each in options for each in self.without)

    def __str__(self) -> str:
        """For a list that is for everybody."""
        if self.given is not None:
            return f"With `{self.given}`: {self.do}"
        return f"Without {' and '.join(f'`{each}`' for each in self.without)}: {self.do}" if self.without else self.do


@dataclass(frozen=True)
class Advice:
    """What an error means in a sentence, and what to do, in the order in which to try it.

    `commands` help to find out, with MODEL for what was to be loaded. `passes` says that the same command may succeed
    another time.
    """

    means: str
    steps: tuple[str | Step, ...]
    commands: tuple[str, ...] = ()
    passes: bool = False

    def steps_for(self, options: Collection[str]) -> list[str]:
        """What to do about a load with these options."""
        return [each.do if isinstance(each, Step) else each for each in self.steps if _applies(each, options)]


def _applies(step: str | Step, options: Collection[str]) -> bool:
    return isinstance(step, str) or step.applies(options)


_FETCH_AGAIN = "Fetch the checkpoint again, and compare the sizes and hashes of its files with the source."

_AS_THE_MESSAGE_SAYS = "Do what the message ends with: it is about this very case."

ADVICE: dict[str, Advice] = {
    "MemoryBudgetError": Advice(
        "The load would take more memory than is allowed, or than there is.",
        (
            "Read in the message how much is missing.",
            Step("Do what it ends with, if that is advice: it is about this very case.", without=("--fit",)),
            Step("Raise the limit: it is your own, and the machine may have more.", given="--max-memory"),
            Step(
                "Give a larger size, or `--fit auto` for what the machine has. What is kept as stored takes a part of "
                "it: give fewer `--ignore` and `--override`.",
                given="--fit",
            ),
            Step(
                "Choose a narrower scheme with `-q`, or let `--fit SIZE` choose one for every module. "
                "`quantload compare MODEL` has the peak of each.",
                without=("--fit",),
            ),
            "Make the arena smaller with `--staging`, where megabytes count.",
            Step("End what else holds memory on this machine.", without=("--max-memory", "--fit")),
        ),
        ("quantload compare MODEL",),
    ),
    "ModelNotFoundError": Advice(
        "What was given for MODEL is no model that can be loaded: it is not there, cannot be reached, or is something "
        "else.",
        (
            _AS_THE_MESSAGE_SAYS,
            "Compare it, letter by letter, with the path, the hub id or the URL that you mean. A folder is that which "
            "has the `config.json`.",
            "Of a hub id: is the network there, and does `hf auth login` say who you are, if the model is private or "
            "gated?",
        ),
    ),
    "TruncatedShardError": Advice(
        "A file of the checkpoint is shorter than its header says: a download or a copy has not come to its end.",
        (_FETCH_AGAIN, "If something is still writing it, wait for it and load again."),
        passes=True,
    ),
    "ChangedFileError": Advice(
        "A file of the checkpoint was written to or replaced while it was read; nothing was made of it.",
        ("Find out what writes to this folder, a download or a job that trains, and load when it is done.",),
        passes=True,
    ),
    "CorruptHeaderError": Advice(
        "A safetensors header breaks a rule of the format: the file is damaged, or no safetensors file.",
        (_FETCH_AGAIN,),
    ),
    "MissingShardError": Advice(
        "The index names a file that is not there.",
        (
            "Fetch the missing file that the message names into the folder of the checkpoint; `hf download` goes on "
            "where it stopped.",
        ),
    ),
    "UnsafePathError": Advice(
        "The index names a path outside of the folder of the checkpoint, which no honest tool writes.",
        ("Do not use this checkpoint unless you know who wrote the index, and why.",),
    ),
    "NonFiniteWeightError": Advice(
        "A weight, or a scale of a quantized one, is NaN or infinite.",
        (
            "Compare the file with its source: a damaged one often has such values.",
            "If the model really has them and the message names a pattern for `--ignore`, give that: the layer stays "
            "as it is stored.",
            Step(
                "If the message speaks of it, load without `--strict`: the values are loaded as they are.",
                given="--strict",
            ),
        ),
    ),
    "DamagedEntryError": Advice(
        "An entry of the cache is not what was written.",
        ("Remove the entry that the message names; the next load writes it anew.", "Look at the disk: is it failing?"),
    ),
    "CheckpointError": Advice(
        "The checkpoint cannot be read as it is: it is not complete, not as it should be, or its server refuses.",
        (
            _AS_THE_MESSAGE_SAYS,
            "If it is about `config.json`: is transformers new enough for the model?",
            "If it is about another file: " + _FETCH_AGAIN[0].lower() + _FETCH_AGAIN[1:],
            "If it is about a server: is the network there, and may you read from it?",
        ),
    ),
    "MissingWeightsError": Advice(
        "The model has parameters that the checkpoint has no values for.",
        (
            "Is it the checkpoint of this model class? `architectures` in config.json says which class is built.",
            "Are all shards there? The index names them.",
        ),
    ),
    "UnexpectedWeightsError": Advice(
        "The checkpoint has tensors that the model does not know.",
        ("Load without `--strict` to leave them out, or find out which version of the model they belong to.",),
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
    "UnknownSchemeError": Advice(
        "There is no scheme of that name.",
        ("Give one of the names in the message; `quantload schemes` says of each what it does.",),
        ("quantload schemes",),
    ),
    "UnmatchedPatternError": Advice(
        "A pattern matches no module, and `--strict` makes that an error.",
        ("`quantload plan MODEL --json` lists the names of all modules; correct the pattern.",),
        ("quantload plan MODEL --json",),
    ),
    "UnappliedOptionError": Advice(
        "Something that was asked for changes nothing, and `--strict` makes that an error.",
        ("Leave out the option that the message names, or load without `--strict`.",),
    ),
    "PolicyError": Advice(
        "An option, or what is to be quantized how, cannot be carried out.",
        (
            _AS_THE_MESSAGE_SAYS,
            "Change what the message names; `quantload load --help` says what each option takes.",
        ),
    ),
    "NoKernelError": Advice(
        "Nothing can compute with this scheme on this device.",
        ("The message says why of each kernel: choose another scheme, `--device cpu`, or another `--kernel`.",),
        ("quantload schemes",),
    ),
    "QuantizedWeightError": Advice(
        "Code of the model takes the codes of a quantized weight for numbers.",
        ("Leave the layer as stored, with the pattern for `--ignore` that the message gives.",),
    ),
    "UnsupportedCheckpointError": Advice(
        "quantload does not read this kind of checkpoint.",
        (
            _AS_THE_MESSAGE_SAYS,
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
        passes=True,
    ),
    "LoadCancelledError": Advice(
        "The load was cancelled before it finished.", ("Start it again when you need it.",), passes=True
    ),
    "QuantloadError": Advice("The load ended with an error.", ("Read the message, which says what to do.",)),
    "OSError": Advice(
        "The system refused a file or a connection.",
        ("Look at the name in the message: does it exist, and may you read or write it? Is the network there?",),
        passes=True,
    ),
    "KeyboardInterrupt": Advice("The load was interrupted.", ("Start it again when you need it.",), passes=True),
}
UNEXPECTED = Advice(
    "Something happened that quantload does not expect.",
    ("Please report it, with this page and what the command printed.", "-v logs more while it loads."),
)


def class_names(error: BaseException) -> list[str]:
    """The names of the classes of an error, its own first."""
    return [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, BaseException)]


def advised(types: Iterable[str]) -> str:
    """Under which class there is advice for an error, by the names of its classes; its own where there is none."""
    names = [*types]
    return next((name for name in names if name in ADVICE), names[0])


def advice_for(types: Iterable[str]) -> Advice:
    """The advice for an error by the names of its classes, its own first."""
    return ADVICE.get(advised(types), UNEXPECTED)
