"""What becomes of loads, conversions and caches at bad moments: files that change, reads and disks that fail, signals.

    python bench/faults.py                          # about half an hour
    python bench/faults.py --tries 3 --only signals

Nothing half-finished may be taken for finished, a load or conversion that ends without an error has the right bytes,
one that cannot raises a `QuantloadError`, and the next run has the right bytes. What is not so is counted as wrong, and
the script ends with 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults_disk import disks
from faults_entries import racing, spoilt
from faults_files import changing, failing
from faults_signals import signals
from faults_subject import Row, Subject
from machine import describe_machine, headline
from markdown import markdown
from result_files import RESULTS, write_result

TRIES = {"signals": 50, "entries": 120, "files": 30, "reads": 12, "disks": 25}
"""Of each kind of fault; `entries` are all kinds together, and 40 times as many race."""
GROUPS = tuple(TRIES)
RACING = 40


def run(groups: tuple[str, ...], tries: dict[str, int], root: Path, seed: int) -> Iterator[Row]:
    """The rows of the table, one after the other."""
    subject = Subject(root)
    if "signals" in groups:  # first: a process in which torch has computed cannot be forked
        yield from signals(subject, tries["signals"], seed)
    if "entries" in groups:
        yield racing(root / "racing", tries["entries"] * RACING, seed, kills=tries["entries"] // 6)
    expected = subject.measure()
    more: dict[str, Callable[[], Iterator[Row]]] = {
        "entries": lambda: spoilt(subject, expected, tries["entries"], seed),
        "files": lambda: changing(subject, expected, tries["files"], seed),
        "reads": lambda: failing(subject, expected, tries["reads"], seed),
        "disks": lambda: disks(subject, expected, tries["disks"], seed),
    }
    for name, rows in more.items():
        if name in groups:
            yield from rows()


def render(result: dict[str, Any]) -> str:
    """How often each kind of fault was tried in each way, and what came of it."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["group"], row["way"]), []).append(row)
    lines = [(group, way, *_sums(rows)) for (group, way), rows in found.items()]
    lines.append(("all", "", *_sums(result["rows"], said=False)))
    return markdown(lines, ("fault", "while", "kinds", "tries", "what came of it", "wrong"))


def _sums(rows: list[dict[str, Any]], said: bool = True) -> tuple[str, str, str, str]:
    outcomes: Counter[str] = Counter()
    for row in rows:
        outcomes.update(row["outcomes"])
    text = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common()) if said else ""
    return str(len(rows)), f"{sum(row['tries'] for row in rows):,}", text, str(sum(row["wrong"] for row in rows))


def main(arguments: list[str] | None = None) -> int:
    """Try, print the table, write the dated JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--tries", type=int, help="of each kind of fault, in place of those of each group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    tries = dict.fromkeys(TRIES, options.tries) if options.tries else TRIES
    logging.getLogger("quantload").setLevel(logging.ERROR)  # a warning is what most of these loads should give
    machine, rows, start = describe_machine(), [], time.monotonic()
    print(headline(machine))
    with tempfile.TemporaryDirectory() as root:
        for row in run(tuple(options.only), tries, Path(root), options.seed):
            rows.append(row.to_json())
            outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(row.outcomes.items()))
            print(
                f"{row.group}, {row.way}: {row.what}: {row.tries} tries, {outcomes}; {len(row.wrong)} wrong", flush=True
            )
            for example in row.wrong[:5]:
                print(f"    {example}", flush=True)
    settings = {"tries": tries, "seed": options.seed, "seconds": round(time.monotonic() - start)}
    result = {"machine": machine, "settings": settings, "rows": rows}
    print(f"\n{render(result)}")
    reduced = "" if tries == TRIES and tuple(options.only) == GROUPS else "part"
    print(f"\nwritten: {write_result('faults', result, options.results, reduced)}")
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
