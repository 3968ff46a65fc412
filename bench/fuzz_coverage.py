"""Which lines of the package an input reaches that none before it did: what makes an input worth keeping."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any, Self


class NewLines:
    """Lines of code in files whose name contains `part`, each counted once; code whose lines are known costs little."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._left: dict[CodeType, set[int]] = {}
        self._found = 0
        self.total = 0

    def __enter__(self) -> Self:
        self._found = 0
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)
        self.total += self._found

    @property
    def found(self) -> int:
        """New lines of the last input."""
        return self._found

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        left = self._left.get(code)
        if left is None:
            ours = self._part in code.co_filename
            left = self._left[code] = {line for *_, line in code.co_lines() if line is not None} if ours else set()
        return self._line if left else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        left = self._left[frame.f_code]
        if event == "line" and frame.f_lineno in left:
            left.discard(frame.f_lineno)
            self._found += 1
        return self._line
