"""HTML from Python: whatever is put into an element is text, unless an element made it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

VOID = frozenset({"meta", "br", "wbr", "input", "link", "col"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, /, *children: str, attributes: Mapping[str, object] | None = None, **more: object) -> Markup:
    """An element with children, which are escaped unless they are `Markup`.

    An attribute that is None or False is left out, one that is True has no value. `class_` is the class, and an
    underscore stands for a hyphen.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in more.items()} | dict(attributes or {})
    shown = "".join(_attribute(key, value) for key, value in given.items() if value is not None and value is not False)
    inside = "".join(map(text, children))
    return Markup(f"<{tag}{shown}>" if tag in VOID else f"<{tag}{shown}>{inside}</{tag}>")


def text(value: str) -> Markup:
    """A string as HTML: escaped unless it is `Markup`. A lone surrogate, which no file can hold, is a question mark."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(value.encode(errors="replace").decode()))


def joined(parts: Iterable[str]) -> Markup:
    """Several pieces one after the other."""
    return Markup("".join(map(text, parts)))


def prose(said: str) -> Markup:
    """A sentence in which what stands between backticks is code."""
    parts = said.split("`")
    return joined(element("code", part) if index % 2 else part for index, part in enumerate(parts))


def dotted(name: str) -> Markup:
    """The name of a module, which a line may break behind its dots."""
    return Markup("<wbr>".join(text(part) for part in name.replace(".", ".\0").split("\0")))


def table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> Markup:
    """A table that scrolls by itself where it is too wide: the first `left` columns are text, the others numbers."""
    inner = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *(element("th", each, scope="col") for each in head))),
        element("tbody", *map(_row, rows)),
        class_=f"left{left}",
    )
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _row(cells: Iterable[str]) -> Markup:
    first, *others = cells
    return element("tr", element("th", first, scope="row"), *(element("td", each) for each in others))


def _attribute(key: str, value: object) -> str:
    return f" {key}" if value is True else f' {key}="{text(str(value))}"'
