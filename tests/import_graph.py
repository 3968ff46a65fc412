"""Which module of the package imports which, read from the source: imports inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "quantload"


@dataclass(frozen=True)
class Import:
    """One import: the module it stands in, its line, and the name it asks for (a module, or a name in one)."""

    importer: str
    line: int
    target: str


def modules_of(package: Path) -> dict[str, Path]:
    """The dotted name of every module under the folder of the package `quantload`; links to folders are followed."""
    found: dict[str, Path] = {}
    folders = [package]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if path.is_dir() and path.name != "__pycache__":
                folders.append(path)
            elif path.suffix == ".py":
                parts = (PACKAGE, *path.relative_to(package).with_suffix("").parts)
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path) -> Iterator[Import]:
    """Every import of one module, as it is asked for, by absolute name.

    A relative import that climbs out of the package has a target that begins with a dot. `import_module(".name",
    __package__)` counts where the name is a constant; a name that is put together at run time cannot be read here.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield Import(name, node.lineno, alias.name)
            case ast.ImportFrom():
                base = _absolute(package, node.level, node.module or "")
                for alias in node.names:
                    yield Import(name, node.lineno, f"{base}.{alias.name}")
            case ast.Call(
                func=ast.Name("import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str(asked)), *_],
            ):
                level = len(asked) - len(asked.lstrip("."))
                yield Import(name, node.lineno, _absolute(package, level, asked.lstrip(".")))


def _absolute(package: str, level: int, module: str) -> str:
    if not level:
        return module
    parts = package.split(".")
    if level > len(parts):
        return f"{'.' * level}{module}"
    return ".".join([*parts[: len(parts) - level + 1], *([module] if module else [])])


def within(modules: Mapping[str, Path]) -> dict[str, list[Import]]:
    """For every module its imports of modules of the package, with the module itself as the target.

    A package's own `__init__`, which runs first when a module in it is imported, is no import of that module here.
    """
    graph: dict[str, list[Import]] = {}
    for name, path in modules.items():
        graph[name] = []
        for found in imports_of(name, path):
            target = found.target if found.target in modules else found.target.rpartition(".")[0]
            if target in modules and target != name:
                graph[name].append(Import(name, found.line, target))
    return graph


def circles(graph: Mapping[str, list[Import]]) -> list[list[str]]:
    """Every way round that a depth-first walk meets: none exactly when no module imports itself through others."""
    found: list[list[str]] = []
    done: set[str] = set()
    way: list[str] = []

    def walk(name: str) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            way.append(name)
            for target in dict.fromkeys(one.target for one in graph[name]):
                walk(target)
            done.add(way.pop())

    for name in graph:
        walk(name)
    return found
