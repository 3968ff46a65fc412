"""Commands whose options come in groups: dataclasses of options, and of other such groups."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints

from typer.models import OptionInfo


def command_with_groups(function: Callable[..., None]) -> Callable[..., None]:
    """A command for typer whose parameters are those of `function`, groups of options taken apart."""
    hints = get_type_hints(function, include_extras=True)
    own = inspect.signature(function).parameters.items()
    parameters: list[inspect.Parameter] = []
    for name, parameter in own:
        group = is_dataclass(hints[name])
        if group:
            parameters += _options_of(hints[name])
        else:
            parameters.append(parameter.replace(annotation=_with_variable(name, hints[name])))

    @functools.wraps(function)
    def command(**given: Any) -> None:
        function(**{name: _taken(hints[name], name, given) for name, _ in own})

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _options_of(group: Any, panel: str | None = None) -> Iterator[inspect.Parameter]:
    """The options of a group, and of the groups in it; in the help, those of an inner one stand under what it is."""
    hints = get_type_hints(group, include_extras=True)
    for each in fields(group):
        hint = hints[each.name]
        if is_dataclass(hint):
            yield from _options_of(hint, inspect.getdoc(hint))
            continue
        hint = _with_variable(each.name, hint, panel and panel.rstrip("."))
        yield inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hint)


def _with_variable(name: str, hint: Any, panel: str | None = None) -> Any:
    """An option that an environment variable can give too, in a panel of the help; an argument as it is."""
    kind, (option,) = hint.__origin__, hint.__metadata__
    if not isinstance(option, OptionInfo):
        return hint
    option = copy.copy(option)
    option.rich_help_panel = option.rich_help_panel or panel
    names = (option.default, *(option.param_decls or ()))  # typer takes the first name for a default until it is used
    flag = next((each for each in names if isinstance(each, str) and each.startswith("--")), name)
    option.envvar = option.envvar or f"QUANTLOAD_{flag.removeprefix('--').replace('-', '_').upper()}"
    option.show_envvar = False  # the help of `quantload` says it of all of them
    return Annotated[kind, option]


def _taken(hint: Any, name: str, given: Mapping[str, Any]) -> Any:
    """The value of a parameter, a group put together from what was given for its options."""
    if not is_dataclass(hint):
        return given[name]
    hints = get_type_hints(hint, include_extras=True)
    return hint(**{each.name: _taken(hints[each.name], each.name, given) for each in fields(hint)})  # type: ignore[operator]
