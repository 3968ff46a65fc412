"""Which part of the package may import which: a lower floor never imports a higher one, and nothing in a circle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from import_graph import PACKAGE, Import, circles, imports_of, modules_of, within

ROOT = Path(__file__).parent.parent
MODULES = modules_of(ROOT / "loader")


@dataclass(frozen=True)
class Floor:
    """What may be imported besides the floor's own modules (floors, or single modules of them), and why no more."""

    may: str
    why: str


KERNELS = "kernels kernels.reference"
GROUND = "errors options local_paths addresses collector interrupts shortage memory.amounts schemes.names progress"
FLOORS: dict[str, Floor] = {
    "errors": Floor("", "everybody raises them"),
    "progress": Floor("", "who is told how far a load is"),
    "interrupts": Floor("", "context managers around signals, and what asks them while it waits"),
    "local_paths": Floor("errors", "what people write for files and folders"),
    "addresses": Floor("", "what people write for URLs, and what of it may be shown"),
    "collector": Floor("", "a context manager around Python's own collector"),
    "kernels.system_calls": Floor("", "what systems differ in, for kernels/ and the loader alike"),
    "control_groups": Floor("", "files of the system that say what a process may take"),
    "threads": Floor("control_groups kernels.system_calls", "settled before torch is imported"),
    "shortage": Floor(
        "errors kernels.system_calls", "what the system refuses, to whoever asks it for memory or a thread"
    ),
    "kernels": Floor(
        "", "what all kernels share; an engine may take kernels/ without the loader, and so without errors"
    ),
    "kernels.reference": Floor("kernels", "the meaning of the operations, whatever runs them"),
    "kernels.cpu.processor": Floor("", "asks LLVM what the processor can do"),
    "kernels.cpu.ir": Floor("kernels kernels.cpu.processor", "writes code, compiles and runs none"),
    "kernels.cpu": Floor(
        f"{KERNELS} kernels.system_calls kernels.cpu.ir kernels.cpu.processor", "works where there is no GPU or Triton"
    ),
    "kernels.gpu.jit": Floor("", "Triton's own language: its compiler follows calls into nothing else"),
    "kernels.gpu": Floor(f"{KERNELS} kernels.gpu.jit", "works where there is no numba"),
    "kernels.implementations": Floor(f"{KERNELS} kernels.cpu kernels.gpu", "the list of all of them"),
    "kernels.registry": Floor(f"{KERNELS} kernels.cpu kernels.gpu kernels.implementations", "chooses from the list"),
    "cpu_kernels": Floor("errors kernels.cpu", "loads numba with the package's own errors"),
    "memory.amounts": Floor("errors", "what people write for sizes"),
    "schemes.names": Floor("errors", "checks names before torch is imported"),
    "options": Floor(
        "errors local_paths threads kernels.system_calls kernels.registry memory.amounts schemes.names",
        "checks what a caller asks for, kernels and schemes by name included",
    ),
    "geometry": Floor("errors kernels.formats", "where a piece lies: no files, no modules"),
    "checkpoint": Floor(
        "errors options interrupts local_paths addresses shortage kernels.system_calls",
        "files of any model: nothing about quantization",
    ),
    "page": Floor("memory.amounts", "shows the JSON of a report, whoever made it"),
    "memory": Floor(
        "errors shortage progress control_groups memory.amounts kernels.statistics kernels.system_calls page",
        "measures and plans a load without knowing its steps",
    ),
    "schemes": Floor(
        f"errors options shortage schemes.names geometry checkpoint {KERNELS} kernels.registry",
        "what a format means for a module",
    ),
    "online": Floor(
        "errors shortage geometry kernels.formats kernels.statistics schemes",
        "an engine can use the closures as they are",
    ),
    "model": Floor(
        "errors interrupts options shortage geometry kernels.formats checkpoint schemes online",
        "the transformers side: whose parameter is where",
    ),
    "pieces": Floor(f"errors geometry {KERNELS} checkpoint schemes online model", "what is read at once, and for whom"),
    "plan": Floor(f"{GROUND} checkpoint memory schemes online model pieces", "says what a load will do"),
    "ranks.launch": Floor("errors schemes.registry", "is asked before torch is imported"),
    "ranks": Floor(
        "errors options shortage geometry checkpoint memory online model",
        "what a load asks of the other processes of its model; none of it, in a load of one",
    ),
    "draft": Floor(
        f"{GROUND} cpu_kernels checkpoint memory schemes online model plan ranks",
        "is shared by load, convert and cache",
    ),
    "fit": Floor("", "a folder"),
    "fit.peaks": Floor(f"{GROUND} geometry memory schemes model draft", "what a draft would take with other schemes"),
    "fit.vocabulary": Floor("options schemes draft", "which modules of a draft are its head and its embedding"),
    "fit.expected_loss": Floor(
        f"{GROUND} page schemes draft fit.vocabulary", "what a draft is expected to lose, by names and schemes alone"
    ),
    "fit.warning": Floor(f"{GROUND} page schemes draft fit.expected_loss", "what a draft is warned of"),
    "fit.room": Floor(f"{GROUND} memory model draft", "how large a model may be here"),
    "fit.choice": Floor(
        f"{GROUND} memory schemes draft fit.peaks fit.vocabulary fit.expected_loss", "bytes and losses to choose from"
    ),
    "fit.samples": Floor(
        f"{GROUND} kernels.statistics geometry checkpoint schemes draft fit.expected_loss", "a look at some weights"
    ),
    "fit.policy": Floor(
        f"{GROUND} checkpoint memory schemes draft fit.vocabulary fit.expected_loss fit.room fit.choice",
        "plans with other schemes until a load fits",
    ),
    "fit.comparing": Floor(
        f"{GROUND} checkpoint memory schemes draft fit.peaks fit.expected_loss fit.choice fit.samples",
        "what one could choose, side by side",
    ),
    "planning": Floor(f"{GROUND} checkpoint draft fit.policy fit.warning", "a load asked for its plan alone"),
    "fit.check": Floor(f"{GROUND} memory model draft fit.peaks", "what a draft finds on this machine"),
    "phases": Floor("memory", "a clock"),
    "spans": Floor("memory", "tells a tracer that others have imported"),
    "recording": Floor(f"{GROUND} checkpoint memory schemes model plan phases spans", "says what a load did"),
    "convert": Floor(
        f"{GROUND} {KERNELS} geometry checkpoint memory schemes online model pieces plan draft recording "
        "fit.expected_loss fit.room fit.policy",
        "a flow of its own beside load: neither knows the other",
    ),
    "cache": Floor(
        f"{GROUND} kernels.system_calls checkpoint memory schemes online model plan ranks draft",
        "a load calls it at three places",
    ),
    "reload.settings": Floor("options checkpoint ranks", "what a model remembers of its load: plain values"),
    "reload.remember": Floor("options draft ranks reload.settings", "a load leaves it on its model"),
    "quantized_model": Floor("memory reload.settings", "a type"),
    "digest": Floor("checkpoint schemes", "what a model holds in the end, whoever loaded it"),
    "dummy": Floor(
        f"{GROUND} checkpoint memory schemes model draft cache", "stands where a load has its cache: weights made up"
    ),
    "load": Floor(
        f"{GROUND} threads checkpoint memory schemes online model plan ranks draft fit.policy fit.check fit.warning "
        "recording cache quantized_model digest dummy reload.remember",
        "the flow of a load",
    ),
    "reload": Floor(
        f"{GROUND} kernels.statistics geometry checkpoint memory schemes online model pieces plan draft recording "
        "cache quantized_model digest ranks reload.settings reload.remember",
        "a flow of its own beside load: neither knows the other",
    ),
    "engines": Floor(
        f"{GROUND} {KERNELS} cpu_kernels geometry checkpoint memory schemes online model pieces plan ranks recording "
        "load",
        "doors to a load, or to the closures, for those who have an engine",
    ),
    "tokenizer": Floor("errors checkpoint", "text becomes tokens, whoever generates behind them"),
    "generating": Floor("errors shortage checkpoint model tokenizer", "answers a prompt with the model it is given"),
    "fit.text_windows": Floor("errors checkpoint model tokenizer", "parts of a text, whoever measures on them"),
    "fit.kept_predictions": Floor("errors memory.amounts", "a file of numbers"),
    "fit.sensitivity": Floor(
        f"{GROUND} checkpoint schemes model cache kernels.nl4_levels fit.expected_loss fit.text_windows load",
        "a user of load like any other",
    ),
    "fit.evaluating": Floor(
        f"{GROUND} checkpoint schemes draft fit.policy fit.kept_predictions fit.text_windows load",
        "a user of load like any other",
    ),
    "server": Floor(
        "errors shortage progress options local_paths kernels.system_calls page checkpoint memory memory.amounts "
        "schemes.names schemes.ahead model dummy load reload ranks ranks.launch tokenizer",
        "a user of load like any other",
    ),
    "cli.logs": Floor("", "log lines and the console they go to"),
    "cli.load_options": Floor("errors options memory.amounts", "imported before anything heavy is"),
    "cli.model_options": Floor(
        "errors options schemes.names ranks.launch cli.load_options", "imported before anything heavy is"
    ),
    "cli.options": Floor(
        "errors options schemes.names ranks.launch cli.logs cli.load_options cli.model_options",
        "imported before anything heavy is",
    ),
    "cli.exit_codes": Floor("errors shortage", "what a number says"),
    "cli.groups": Floor("", "how fields of a dataclass become parameters of a command, whatever they mean"),
    "cli.pages": Floor("errors addresses memory page", "what a command leaves for a browser"),
    "cli.variables": Floor("", "names in the environment"),
    "cli.failing": Floor(
        "errors addresses shortage memory page ranks.launch cli.logs cli.exit_codes cli.pages cli.variables",
        "how every command ends that fails",
    ),
    "cli.output": Floor("errors shortage memory", "what a command prints, whatever it did"),
    "cli.preparing": Floor(
        f"{GROUND} checkpoint memory ranks.launch fit.sensitivity cli.model_options cli.options",
        "what is said before a command begins",
    ),
    "cli.compare": Floor(
        "memory.amounts fit.comparing cli.failing cli.groups cli.model_options cli.options cli.output cli.preparing",
        "a user of the package",
    ),
    "cli.evaluate": Floor(
        "threads memory.amounts fit.evaluating cli.failing cli.groups cli.load_options cli.model_options cli.options "
        "cli.output cli.preparing",
        "a user of the package",
    ),
    "cli.serve_options": Floor("cli.preparing", "imported before anything heavy is"),
    "cli.serve": Floor(
        "errors threads server ranks.launch cli.groups cli.options cli.preparing cli.serve_options",
        "a user of the package",
    ),
    "cli.generate": Floor(
        "threads checkpoint generating load ranks.launch cli.logs cli.failing cli.groups cli.options cli.output "
        "cli.preparing",
        "a user of the package",
    ),
    "cli.commands": Floor(
        f"{GROUND} threads memory schemes fit.check planning fit.warning load convert ranks.launch cli.logs "
        "cli.options cli.exit_codes cli.failing cli.groups cli.pages cli.output cli.preparing cli.compare cli.evaluate "
        "cli.serve cli.generate cli.variables",
        "a user of the package",
    ),
    "cli.process": Floor("cli.commands", "how its process ends"),
    "cli": Floor("cli.commands cli.preparing cli.process", "names of the command line"),
    "__main__": Floor("cli", "python -m quantload"),
    "": Floor(
        "errors options collector memory planning load reload convert engines quantized_model",
        "the public names, each imported when it is first used",
    ),
}
"""From the ground up: a floor names only floors above it in this list, so that the list itself has no circle."""

WITHOUT_TRANSFORMERS = list(FLOORS)[: list(FLOORS).index("model")]
"""The floors below `model`, which is what knows transformers."""


def floor_of(module: str, floors: Iterable[str] = FLOORS) -> str:
    """The floor with the longest name that the module's name begins with."""
    name = module.removeprefix(PACKAGE).removeprefix(".")
    return max((floor for floor in floors if floor in ("", name) or name.startswith(f"{floor}.")), key=len)


def uphill(graph: Mapping[str, list[Import]], floors: Mapping[str, Floor]) -> list[str]:
    """Imports that the table does not allow, as lines to read."""
    found = []
    for one in (one for imports in graph.values() for one in imports):
        here, there = floor_of(one.importer, floors), floor_of(one.target, floors)
        allowed = floors[here].may.split()
        if here != there and there not in allowed and one.target.removeprefix(f"{PACKAGE}.") not in allowed:
            found.append(f"{one.importer}:{one.line} imports {one.target}, but {here or PACKAGE}: {floors[here].why}")
    return found


def test_no_floor_imports_a_higher_one() -> None:
    assert uphill(within(MODULES), FLOORS) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(within(MODULES)) == []


def test_every_module_stands_on_a_floor_of_the_table() -> None:
    assert [name for name in MODULES if floor_of(name) == "" and name != PACKAGE] == []
    assert [floor for floor in FLOORS if not any(floor_of(name) == floor for name in MODULES)] == []


def test_the_table_goes_from_the_ground_up() -> None:
    below: list[str] = []
    for name, floor in FLOORS.items():
        known = {*below, *(module.removeprefix(f"{PACKAGE}.") for module in MODULES if floor_of(module) in below)}
        assert set(floor.may.split()) <= known, name
        below.append(name)


def test_imports_within_the_package_are_relative_and_do_not_climb_out_of_it() -> None:
    absolute = (PACKAGE, "loader", "kernels")  # the folders' names are never installed
    wrong = [
        f"{name}: {line.strip()}"
        for name, path in MODULES.items()
        for line in path.read_text().splitlines()
        if line.split()[:1] in (["from"], ["import"]) and line.split()[1].split(".")[0] in absolute
    ]
    climbing = [one for name, path in MODULES.items() for one in imports_of(name, path) if one.target.startswith(".")]
    assert wrong == []
    assert climbing == []


def test_only_the_floors_from_model_up_import_transformers() -> None:
    found = [
        one
        for name, path in MODULES.items()
        if floor_of(name) in WITHOUT_TRANSFORMERS
        for one in imports_of(name, path)
        if one.target.split(".")[0] == "transformers"
    ]
    assert found == []


def test_the_closures_are_imported_where_there_is_no_transformers() -> None:
    wanted = [name for name in MODULES if floor_of(name) == "online"]
    code = (
        "import sys; from importlib import import_module; sys.modules['transformers'] = None\n"
        f"for name in {wanted}: import_module(name)\n"
        f"print([name for name in sys.modules if name.startswith('{PACKAGE}.model')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from ..high import top", "quantload.low.one:1 imports quantload.high.top, but low: the ground"),
        (
            "def f():\n    from ..high.top import f",
            "quantload.low.one:2 imports quantload.high.top, but low: the ground",
        ),
        ("import quantload.high.top as t", "quantload.low.one:1 imports quantload.high.top, but low: the ground"),
        (
            'import_module("..high.top", __package__)',
            "quantload.low.one:1 imports quantload.high.top, but low: the ground",
        ),
        ("from . import other\nimport json", None),
    ],
)
def test_an_import_uphill_is_found_wherever_it_stands(tmp_path: Path, source: str, message: str | None) -> None:
    modules = _package(tmp_path, {"low/one.py": source, "low/other.py": "", "high/top.py": "from ..low import one"})
    found = uphill(within(modules), {"low": Floor("", "the ground"), "high": Floor("low", "the roof")})
    assert found == ([message] if message else [])


def test_a_circle_through_an_import_inside_a_function_is_found(tmp_path: Path) -> None:
    modules = _package(
        tmp_path, {"a.py": "from . import b", "b.py": "from .c import f", "c.py": "def f():\n    from .a import g"}
    )
    assert circles(within(modules)) == [["quantload.a", "quantload.b", "quantload.c", "quantload.a"]]


def test_a_relative_import_that_climbs_out_of_the_package_is_found(tmp_path: Path) -> None:
    modules = _package(tmp_path, {"low/one.py": "from ...outside import name"})
    ((_, path),) = modules.items()
    assert [one.target for one in imports_of("quantload.low.one", path)] == ["...outside.name"]


def _package(folder: Path, files: dict[str, str]) -> dict[str, Path]:
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)
    return modules_of(folder)
