"""Sum up the runs of `bench/load.py`: medians, the table, and the goals with what was reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from goals import Goal, at_least, at_most, columns
from load_process import Run
from loaders import LOADERS

GB = 1e9
MIB = 1 << 20
Accept = Callable[[str], bool]
PEAK_SLACK = 64 * MIB
COLD_GOAL = 1.1
MIN_SHARE = 0.9  # a peer that leaves more than this in BF16 is not compared for speed
FILE_PAGES_SLACK = MIB
NOTE_LENGTH = 240


@dataclass(frozen=True)
class Row:
    """All runs of one loader on one checkpoint, summed up. Bytes are over the baseline; worst case where it matters."""

    checkpoint: str
    loader: str
    cold: bool
    status: str
    detail: str
    runs: int
    seconds: float | None = None
    seconds_all: tuple[float, ...] = ()
    checkpoint_bytes: int = 0
    cpu_seconds: float | None = None
    warm_up_seconds: float | None = None
    final_bytes: int | None = None
    peak_anon: int | None = None
    peak_total: int | None = None
    anon_after: int | None = None
    checkpoint_pages_after: int | None = None
    linear_share: float | None = None
    expert_share: float | None = None
    generates: bool | None = None
    generate_detail: str = ""
    report: dict[str, Any] | None = None

    @property
    def rate(self) -> float | None:
        """Bytes of the BF16 checkpoint a second."""
        return self.checkpoint_bytes / self.seconds if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """This row, ready for JSON."""
        return {**asdict(self), "bytes_per_second": self.rate}


def _worst(runs: Sequence[Run], key: str) -> int | None:
    values = [run.facts[key] for run in runs if key in run.facts]
    return max(values) if values else None


def _generate_verdict(runs: Sequence[Run]) -> tuple[bool | None, str]:
    answers = [run.facts["generate"] for run in runs if "generate" in run.facts]
    if not answers:
        return None, ""
    return all(answer["ok"] for answer in answers), "; ".join(answers[0].get("problems", []))


def summarize(checkpoint: str, loader: str, cold: bool, checkpoint_bytes: int, runs: Sequence[Run]) -> Row:
    """One row from the runs of a loader: the median time, the largest memory, the first thing that went wrong."""
    good = [run for run in runs if run.status == "ok"]
    bad = [run for run in runs if run.status != "ok"]
    if not good or bad:
        return Row(checkpoint, loader, cold, bad[0].status, bad[0].detail, len(runs), checkpoint_bytes=checkpoint_bytes)
    seconds = tuple(run.facts["seconds"] for run in good)
    warm_ups = [run.facts["warm_up_seconds"] for run in good if "warm_up_seconds" in run.facts]
    cpu = [run.facts["user_seconds"] + run.facts["system_seconds"] for run in good if "user_seconds" in run.facts]
    shares = good[0].facts.get("quantized", {})
    generates, problem = _generate_verdict(good)
    return Row(
        checkpoint=checkpoint,
        loader=loader,
        cold=cold,
        status="ok",
        detail="",
        runs=len(good),
        seconds=statistics.median(seconds),
        seconds_all=seconds,
        checkpoint_bytes=checkpoint_bytes,
        cpu_seconds=statistics.median(cpu) if cpu else None,
        warm_up_seconds=statistics.median(warm_ups) if warm_ups else None,
        final_bytes=_worst(good, "final_bytes"),
        peak_anon=_worst(good, "peak_anon"),
        peak_total=_worst(good, "peak_total"),
        anon_after=_worst(good, "anon_after"),
        checkpoint_pages_after=_worst(good, "checkpoint_pages_after"),
        linear_share=shares.get("linear"),
        expert_share=shares.get("expert"),
        generates=generates,
        generate_detail=problem,
        report=good[0].facts.get("report"),
    )


def _gb(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value / GB:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _yes_no(value: bool | None) -> str:
    return "-" if value is None else ("yes" if value else "NO")


HEADER = (
    "loader",
    "runs",
    "seconds",
    "GB/s",
    "cpu s",
    "start-up s",
    "final GB",
    "peak anon GB",
    "peak/final",
    "peak total GB",
    "file pages GB",
    "linear",
    "experts",
    "generates",
)


def _cells(row: Row) -> list[str]:
    if row.seconds is None:
        return [row.loader, str(row.runs), row.status, *["-"] * (len(HEADER) - 3)]
    ratio = row.peak_anon / row.final_bytes if row.peak_anon is not None and row.final_bytes else None
    return [
        row.loader,
        str(row.runs),
        f"{row.seconds:.3f}",
        _gb(row.rate),
        "-" if row.cpu_seconds is None else f"{row.cpu_seconds:.2f}",
        "-" if row.warm_up_seconds is None else f"{row.warm_up_seconds:.1f}",
        _gb(row.final_bytes, 3),
        _gb(row.peak_anon, 3),
        "-" if ratio is None else f"{ratio:.2f}x",
        _gb(row.peak_total, 3),
        _gb(row.checkpoint_pages_after, 3),
        _percent(row.linear_share),
        _percent(row.expert_share),
        _yes_no(row.generates),
    ]


def print_rows(rows: Iterable[Row]) -> None:
    """One table a checkpoint and page-cache state, with what failed and why under it."""
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.checkpoint, row.cold), []).append(row)
    for (checkpoint, cold), group in groups.items():
        size = f"{group[0].checkpoint_bytes / GB:.2f} GB of BF16, page cache {'cold' if cold else 'warm'}"
        print(f"\n{checkpoint}: {size}")
        print(columns([_cells(row) for row in group], HEADER))
        for row in group:
            for note in filter(None, (row.detail, row.generate_detail)):
                print(f"  {row.loader}: {note[:NOTE_LENGTH]}")


class Goals:
    """Works out the goals from the rows of one run of the benchmark."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {(row.checkpoint, row.loader, row.cold): row for row in rows}
        self._checkpoints = list(dict.fromkeys(key[0] for key in self._rows))

    def all(self) -> list[Goal]:
        """Every goal that at least one row speaks of."""
        found: list[Goal] = []
        parts: tuple[Callable[[str], list[Goal]], ...] = (self._memory, self._plan, self._speed, self._cold)
        for checkpoint in self._checkpoints:
            for part in parts:
                found += part(checkpoint)
        return found + self._experts_rate()

    def _ours(self, checkpoint: str) -> list[Row]:
        return [
            row
            for row in self._rows.values()
            if row.checkpoint == checkpoint and not row.cold and LOADERS[row.loader].family == "quantload"
        ]

    def _peers(self, checkpoint: str, accept: Accept) -> list[Row]:
        found = []
        for row in self._rows.values():
            shares = [share for share in (row.linear_share, row.expert_share) if share is not None]
            comparable = bool(shares) and min(shares) >= MIN_SHARE
            peer = LOADERS[row.loader].family == "peer" and accept(row.loader)
            if row.checkpoint == checkpoint and not row.cold and peer and row.seconds and comparable:
                found.append(row)
        return found

    def _memory(self, checkpoint: str) -> list[Goal]:
        goals = []
        for row in self._ours(checkpoint):
            name = f"{row.loader}: peak <= final + staging + 64 MiB, no file pages left"
            report = row.report or {}
            if row.peak_anon is None or row.final_bytes is None or "staging_peak_bytes" not in report:
                goals.append(Goal(name, checkpoint, None, row.detail or "no load report"))
                continue
            allowed = row.final_bytes + report["staging_peak_bytes"] + PEAK_SLACK
            pages = row.checkpoint_pages_after or 0
            met = row.peak_anon <= allowed and pages <= FILE_PAGES_SLACK
            room = (allowed - row.peak_anon) / MIB
            reached = f"{abs(room):.0f} MiB {'under' if room >= 0 else 'OVER'}, file pages {pages / MIB:.0f} MiB"
            goals.append(Goal(name, checkpoint, met, reached))
        return goals

    def _plan(self, checkpoint: str) -> list[Goal]:
        goals = []
        for row in self._ours(checkpoint):
            report = row.report or {}
            name = f"{row.loader}: plan within 2% of final, never under the peak"
            final, peak = report.get("predicted_final_bytes"), report.get("predicted_peak_bytes")
            if final is None or peak is None or row.final_bytes is None or row.peak_anon is None:
                goals.append(Goal(name, checkpoint, None, row.detail or "no prediction in the report"))
                continue
            off = final / row.final_bytes - 1
            met = abs(off) <= 0.02 and peak >= row.peak_anon
            spare = (peak - row.peak_anon) / MIB
            goals.append(
                Goal(name, checkpoint, met, f"final {off:+.2%}, predicted peak {spare:+.0f} MiB over measured")
            )
        return goals

    def _speed(self, checkpoint: str) -> list[Goal]:
        goals = []
        mxfp4 = self._rows.get((checkpoint, "quark_mxfp4", False))
        if mxfp4 is not None and mxfp4.rate is not None and checkpoint != "tiny":
            goals.append(at_least("quark_mxfp4: >= 12 GB/s", checkpoint, mxfp4.rate / GB, 12, " GB/s"))
        goals += self._against(checkpoint, "quark_mxfp4", 20, "torchao's MXFP4", lambda n: LOADERS[n].format == "mxfp4")
        for scheme in ("int8_per_channel", "fp8_per_channel", "fp8_per_tensor", "fp8_per_block"):
            goals += self._against(checkpoint, scheme, 4, "the fastest 8-bit peer", lambda n: LOADERS[n].bits == 8)
        return goals

    def _against(self, checkpoint: str, scheme: str, times: int, whom: str, accept: Accept) -> list[Goal]:
        ours = self._rows.get((checkpoint, scheme, False))
        if ours is None or ours.seconds is None:
            return []
        name = f"{scheme}: >= {times}x {whom}"
        peers = self._peers(checkpoint, accept)
        if not peers:
            return [Goal(name, checkpoint, None, self._why_no_peer(checkpoint, accept))]
        fastest = min(peers, key=lambda row: row.seconds or 0.0)
        factor = (fastest.seconds or 0.0) / ours.seconds
        return [Goal(name, checkpoint, factor >= times, f"{factor:.1f}x ({fastest.loader})")]

    def _why_no_peer(self, checkpoint: str, accept: Accept) -> str:
        problems = [
            f"{row.loader} {row.detail or row.status}"
            for row in self._rows.values()
            if row.checkpoint == checkpoint and not row.cold and row.status != "ok"
            if LOADERS[row.loader].family == "peer" and accept(row.loader)
        ]
        return "; ".join(problems)[:NOTE_LENGTH] or "no such peer quantized everything here"

    def _cold(self, checkpoint: str) -> list[Goal]:
        floors = [self._rows.get((checkpoint, name, True)) for name in ("read-only", "read-drop")]
        fastest = min((row.seconds for row in floors if row is not None and row.seconds), default=None)
        if fastest is None:
            return []
        goals = []
        for row in self._rows.values():
            ours = LOADERS[row.loader].family == "quantload"
            if row.checkpoint == checkpoint and row.cold and ours and row.seconds is not None:
                name = f"{row.loader}: cold within {COLD_GOAL}x of reading and doing nothing"
                goals.append(at_most(name, checkpoint, row.seconds / fastest, COLD_GOAL, "x"))
        return goals

    def _experts_rate(self) -> list[Goal]:
        dense, moe = (self._rows.get((name, "quark_mxfp4", False)) for name in ("dense", "moe"))
        if dense is None or moe is None or dense.rate is None or moe.rate is None:
            return []
        ratio = moe.rate / dense.rate
        name = "quark_mxfp4: experts at the same rate as dense (>= 0.9x)"
        return [Goal(name, "moe", ratio >= 0.9, f"{ratio:.2f}x")]
