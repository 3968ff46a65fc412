"""docs/memory.svg: what a load holds beside the checkpoint it reads, to the scale of a load that was measured.

python bench/all.py --tables-only       # draws it anew from the newest result of bigger_than_memory.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from result_files import RESULTS, newest

FILE = Path(__file__).resolve().parent.parent / "docs" / "memory.svg"
GIB = 1 << 30
_WIDTH, _LEFT, _RIGHT = 760, 20, 740
_DONE = "Workers read pieces of at most 8 MiB into an arena, quantize them there, and write codes and scales."
_STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 12px; fill: #57606a }
  .page { fill: #ffffff }
  .box { fill: #ffffff; stroke: #57606a }
  .stored { fill: #c8d1da }
  .model { fill: #1a7f64 }
  .arena { fill: #b35900 }
  .inside { fill: #ffffff }
  .line { stroke: #57606a; fill: none }
  .limit { stroke: #a40e26; stroke-dasharray: 5 4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .small { fill: #a5b0bb }
    .page { fill: #0d1117 }
    .box { fill: #161b22; stroke: #8b949e }
    .stored { fill: #4a535e }
    .model { fill: #2da87e }
    .arena { fill: #e08a3c }
    .inside { fill: #0d1117 }
    .line { stroke: #8b949e }
    .limit { stroke: #ff7b86 }
  }
"""


def draw(result: Mapping[str, Any]) -> str:
    """The drawing of a result of `bigger_than_memory.py`: SVG in the light or dark scheme of the reader."""
    load = next(run for run in result["runs"] if "report" in run)
    report = load["report"]
    checkpoint, machine = report["checkpoint_bytes"], result["machine"]["memory_bytes"]
    scale = (_RIGHT - _LEFT) / checkpoint
    limit = _LEFT + machine * scale
    title = f"{_gib(checkpoint)} of BF16 are loaded into {_gib(report['final_bytes'])} of MXFP4"
    said = f"{title}, with a peak of {_gib(report['peak_bytes'])}, on a machine of {_gib(machine)}."
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} 390' role='img' aria-labelledby='t d'>",
        f"<title id='t'>{title}</title>",
        f"<desc id='d'>{said} {_DONE}</desc>",
        f"<style>{_STYLE}</style>",
        f"<rect class='page' width='{_WIDTH}' height='390' rx='6'/>",
        *_bar(30, "the checkpoint, on the disk and never whole in memory", checkpoint, scale, "stored"),
        *_bar(100, "the quantized model", report["final_bytes"], scale, "model"),
        *_bar(170, "the peak of the load", report["peak_bytes"], scale, "arena"),
        f"<rect class='model' x='{_LEFT}' y='178' width='{report['final_bytes'] * scale:.1f}' height='24'/>",
        f"<line class='limit' x1='{limit:.1f}' y1='80' x2='{limit:.1f}' y2='212'/>",
        _text(limit + 8, 96, f"memory of the machine: {_gib(machine)}", "small"),
        *_flow(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bar(y: int, name: str, nbytes: int, scale: float, kind: str) -> list[str]:
    width = nbytes * scale
    inside = width > 400
    return [
        _text(_LEFT, y, f"{name}: {_gib(nbytes)}" if inside else name),
        f"<rect class='{kind}' x='{_LEFT}' y='{y + 8}' width='{width:.1f}' height='24'/>",
        *([] if inside else [_text(_LEFT + width + 8, y + 26, _gib(nbytes))]),
    ]


def _flow() -> list[str]:
    """How a piece travels, below the bars; not to scale."""
    boxes = (
        (_LEFT, "stored", "a shard", "safetensors, BF16"),
        (205, "arena", "the staging arena", "two buffers a worker,"),
        (390, "box", "one kernel", "quantizes, measures"),
        (575, "model", "the model", "codes and scales,"),
    )
    below = ("", "of at most 8 MiB each", "the error, in cache", "in their final place")
    arrows = ((185, "read"), (370, "piece"), (555, "write"))
    found = []
    for (x, kind, name, line), more in zip(boxes, below, strict=True):
        inside = "inside" if kind in ("arena", "model") else ""
        found += [
            f"<rect class='{kind}' x='{x}' y='255' width='165' height='42' rx='4'/>",
            _text(x + 82, 281, name, inside, middle=True),
            _text(x + 82, 316, line, "small", middle=True),
            *([_text(x + 82, 332, more, "small", middle=True)] if more else []),
        ]
    for x, what in arrows:
        found += [
            f"<path class='line' d='M{x + 2} 276 H{x + 17} M{x + 12} 271 L{x + 17} 276 L{x + 12} 281'/>",
            _text(x + 10, 248, what, "small", middle=True),
        ]
    found.append(_text(_LEFT, 372, "A buffer is read into again as soon as its piece is quantized.", "small"))
    return found


def _text(x: float, y: float, text: str, kind: str = "", middle: bool = False) -> str:
    more = (f" class='{kind}'" if kind else "") + (" text-anchor='middle'" if middle else "")
    return f"<text x='{x:.0f}' y='{y:.0f}'{more}>{text}</text>"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"


def write(path: Path = FILE, folder: Path = RESULTS) -> list[Path]:
    """Draw the newest result; the file, if it changed."""
    result = newest("bigger_than_memory", folder)
    if result is None or (path.exists() and path.read_text() == draw(result)):
        return []
    path.write_text(draw(result))
    return [path]
