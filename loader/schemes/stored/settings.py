"""A checkpoint's quantization config, read field by field: what is wrong with one is said with its name and value."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...errors import CheckpointError


class Settings:
    """One object of a config, and the path it stands at, such as `quantization_config.config_groups.group_0`."""

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        self._values, self.path = values, path

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, `default` where it is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def choice(self, name: str, supported: Collection[Any], default: Any = None) -> Any:
        """The one of `supported` that the value of a field equals: 128 for 128.0; booleans are no numbers here."""
        value = self.get(name, default)
        for other in supported:
            if value == other and isinstance(value, bool) == isinstance(other, bool):
                return other
        raise self.error(name, value, supported)

    def strings(self, *names: str) -> tuple[str, ...]:
        """The first of some fields that is there and not empty, a list of strings; without one, an empty tuple."""
        for name in names:
            value = self.get(name, [])
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise self.error(name, value, expected="a list of strings, or null")
            if value:
                return tuple(value)
        return ()

    def section(self, name: str) -> Settings | None:
        """An object inside this one, or None where it is missing or null."""
        value = self.get(name)
        return None if value is None else self._inner(value, name)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """The fields of an object inside this one; none where it is missing or null."""
        inner = self.section(name)
        return {} if inner is None else inner._values

    def sections(self, name: str) -> Iterator[tuple[str, Settings | None]]:
        """The objects of an object by their names; None for those that are null."""
        inner = self.section(name)
        if inner is not None:
            for key, value in inner._values.items():
                yield key, None if value is None else inner._inner(value, key)

    def objects(self, name: str) -> list[Settings]:
        """The objects of a field that holds one or a list of them; none where it is missing or null."""
        value = self.get(name, [])
        return [self._inner(item, name) for item in (value if isinstance(value, list) else [value])]

    def known(self, names: Collection[str]) -> None:
        """Raises for a field that is not one of `names`, and not null, [] or {}: what it says would be missed."""
        for name, value in self._values.items():
            if name not in names and value not in (None, [], {}):
                raise CheckpointError(
                    f"config.json: {self._at(name)} is {value!r}, a field that is not known; if it says nothing about "
                    f"the numbers, remove it; known are {', '.join(sorted(names))}"
                )

    def error(
        self, name: str, value: Any, supported: Collection[Any] = (), *, expected: str | None = None
    ) -> CheckpointError:
        """What is wrong with a field: its value, and what is supported or expected instead."""
        wanted = f"expected {expected}" if expected else f"supported: {', '.join(map(repr, supported))}"
        return CheckpointError(
            f"config.json: {self._at(name)} is {value!r}; {wanted}; correct the config, or load the original "
            f"checkpoint, which quantload quantizes while it loads"
        )

    def _inner(self, value: Any, name: str) -> Settings:
        if not isinstance(value, Mapping):
            raise self.error(name, value, expected="an object")
        return Settings(value, self._at(name))

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name
