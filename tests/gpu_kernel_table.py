"""The table of GPU kernels that a test run compiled or interpreted, whichever of its processes did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

HEAD = ("kernel", "target", "compiled", "native instruction", "regs", "spills", "shared", "interpreter")

Record = dict[str, list[tuple[str, ...]]]
"""A table as strings, for another process."""


class Row(NamedTuple):
    """What is known of a kernel that was compiled, as it is shown."""

    native: str
    registers: str
    spills: str
    shared_bytes: str


@dataclass
class Table:
    """Rows by (label, target); interpreter results by label."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    interpreted: dict[str, str] = field(default_factory=dict)

    def add_interpreted(self, label: str, result: str) -> None:
        """Record what the interpreter said of a kernel: "bit for bit", "close", "failed"."""
        if self.interpreted.get(label) != "FAILED":
            self.interpreted[label] = result

    def record(self) -> Record:
        """What `merge` takes."""
        return {
            "rows": [(*key, *row) for key, row in self.rows.items()],
            "interpreted": list(self.interpreted.items()),
        }

    def merge(self, record: Record) -> None:
        """Add what another process recorded."""
        for label, target, *row in record["rows"]:
            self.rows[label, target] = Row(*row)
        for label, result in record["interpreted"]:
            self.add_interpreted(label, result)

    def lines(self) -> list[str]:
        """The table as text; empty when nothing was recorded."""
        if not self.rows and not self.interpreted:
            return []
        body = [
            (label, target, "yes", *row, self.interpreted.get(label, "-"))
            for (label, target), row in sorted(self.rows.items())
        ]
        known = {label for label, _ in self.rows}
        body += [(k, *("-",) * 6, v) for k, v in sorted(self.interpreted.items()) if k not in known]
        widths = [max(len(row[i]) for row in (HEAD, *body)) for i in range(len(HEAD))]
        return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (HEAD, *body)]


TABLE = Table()
"""The one table of a test run."""
