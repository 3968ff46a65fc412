"""A hook of mkdocs: the pages of the site that are not in docs/, and links between documents as the site has them.

README, CONTRIBUTING, CHANGELOG and the READMEs of folders are pages as they are. What is said of Python functions is
made from the code as the site is built; what docs/ says of reports, metrics and errors, by `python .ci/site_pages.py`.
"""

from __future__ import annotations

import builtins
import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "bench.md",
    "deploy/README.md": "deploy.md",
}
"""Where documents outside of docs/ are in the site."""
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)]*)?\)")
_FENCED = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put documents that the navigation does not name yet behind those that it does."""
    named = str(config.nav)
    more = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in named)
    if more and config.nav is not None:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    pages = {site: (ROOT / name).read_text(encoding="utf-8") for name, site in DOCUMENTS.items()}
    for site, text in {**pages, "reference/api.md": api_reference()}.items():
        files.append(File.generated(config, site, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to documents and files of the repository into links of the site, or into names."""
    return with_site_links(markdown, page.file.src_uri)


def with_site_links(markdown: str, site: str) -> str:
    """A page of the site whose links lead to where the site has what they mean."""
    source = next((name for name, place in DOCUMENTS.items() if place == site), f"docs/{site}")
    parts = _FENCED.split(markdown)  # code stays as it is
    return "".join(
        part if part.startswith("```") else _LINK.sub(lambda m: _link(m, source, site), part) for part in parts
    )


def _link(found: re.Match[str], source: str, site: str) -> str:
    target = os.path.normpath(os.path.join(os.path.dirname(source), found["path"]))
    if target in (*DOCUMENTS, "docs/README.md"):
        place = DOCUMENTS.get(target, "index.md")
    elif target.startswith("docs/"):
        place = target.removeprefix("docs/")
    else:
        return f"{found['text']} (`{target}`)" if found["text"].strip("`") != target else f"`{target}`"
    relative = os.path.relpath(place, os.path.dirname(site) or ".")
    return f"{found['image']}[{found['text']}]({relative}{found['anchor'] or ''})"


def troubleshooting() -> str:
    """Every error, what it means and what to do."""
    from quantload import errors
    from quantload.cli import exit_codes
    from quantload.page.advice import ADVICE

    lines = [
        "# Troubleshooting", "",
        "Every message says what was given, what was expected and what to do. On a terminal it ends with the class of "
        "the error, `error: MESSAGE [CLASS]`, which is a heading below. The page of a load that failed "
        "([`--html`](load-page/README.md)) has the same advice, for the options that were given. With `--json` a "
        "command that fails prints an object on standard output: `error` in it has `type`, `message`, `means`, "
        "`remedy` (what to do, a list) and `exit_code`; an option that no command has is told on standard error alone. "
        "What a load logs with `-v` says how far it came.", "",
        "| exit code | means |", "| --- | --- |", "| 0 | all went well |",
        f"| {exit_codes.EXIT_USAGE} | an option, or a pattern, that cannot be carried out |",
        f"| {exit_codes.EXIT_CHECKPOINT} | the checkpoint: a file of it, or what it has for the model |",
        f"| {exit_codes.EXIT_BUDGET} | memory: it does not fit, or a limit of yours says so |",
        f"| {exit_codes.EXIT_OTHER} | anything else |",
        f"| {exit_codes.EXIT_INTERRUPTED} | interrupted, with Ctrl-C |", "",
    ]  # fmt: skip
    for name, advice in ADVICE.items():
        kind = getattr(errors, name, None) or getattr(builtins, name)
        is_own = issubclass(kind, errors.QuantloadError) and kind is not errors.QuantloadError
        of = f"A kind of `{kind.__base__.__name__}`. " if is_own else ""
        lines += [f"## {name}", "", advice.means, "", f"{of}Exit code {exit_codes.exit_code(kind())}.", ""]
        lines += [*(f"{number}. {step}" for number, step in enumerate(advice.steps, 1)), ""]
    return "\n".join(lines)


def report_reference() -> str:
    """The fields of a report and of what is in it."""
    from quantload.memory import report

    kinds = [report.LoadReport, *(kind for kind in vars(report).values() if _is_own(kind, report.__name__))]
    lines = [
        "# The report",
        "",
        "What `--json`, `--report` and `/load_report` give. Sizes are in bytes, times in seconds.",
    ]
    for kind in dict.fromkeys(kinds):
        lines += ["", f"## {kind.__name__}", "", *(line.strip() for line in (kind.__doc__ or "").splitlines()), ""]
        lines += ["| field | type | default |", "| --- | --- | --- |", *map(_field, dataclasses.fields(kind))]
    return "\n".join(lines) + "\n"


def _is_own(kind: Any, module: str) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module


def _field(field: dataclasses.Field[Any]) -> str:
    default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
    default = "empty" if field.default_factory is not dataclasses.MISSING else default
    return f"| `{field.name}` | `{str(field.type).replace('|', 'or')}` | {default} |"


def metrics_reference() -> str:
    """The metrics of loads and of a server, by name."""
    from quantload.memory.metrics import LoadMetrics
    from quantload.memory.report import LoadReport
    from quantload.server.serving_metrics import ServingMetrics

    shown = LoadMetrics()
    fields = dataclasses.fields(LoadReport)
    needed = {each.name for each in fields if each.default is each.default_factory is dataclasses.MISSING}
    ranks = {name: [0] for name in ("rank_bytes_read", "rank_final_bytes", "rank_peak_bytes")}
    names = dict.fromkeys(("model", "quantization", "device"), "")
    shown.on_report(LoadReport.from_dict({**dict.fromkeys(needed, 0), **names, **ranks}))
    server = ServingMetrics("model")
    loads, served = list(shown.collect()), list(server.registry.collect())
    labels = {each._name: each._labelnames for each in vars(server).values() if hasattr(each, "_labelnames")}
    labels |= {family.name: getattr(family, "_labelnames", ()) for family in loads}
    lines = [
        "# Metrics", "",
        "What `/metrics` of [the server](../server.md#metrics) shows. [deploy/](../../deploy/README.md) has alerts for "
        "Prometheus and a dashboard for Grafana.", "",
    ]  # fmt: skip
    for title, families in (("Loads", loads), ("Requests, and the process", served)):
        lines += [f"## {title}", "", "| metric | type | labels | what |", "| --- | --- | --- | --- |"]
        lines += [*(_metric(family, labels.get(family.name, ())) for family in families), ""]
    return "\n".join(lines)


def _metric(family: Any, labels: Iterable[str]) -> str:
    suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
    names = ", ".join(f"`{name}`" for name in labels)
    return f"| `{family.name}{suffix}` | {family.type} | {names or '-'} | {family.documentation} |"


def api_reference() -> str:
    """The public functions and classes, from their docstrings, by mkdocstrings."""
    import quantload

    lines = ["# Python", ""]
    for name, home in sorted(quantload._HOMES.items()):
        lines += [f"::: quantload{home}.{name}", ""]
    return "\n".join(lines)


MADE = {
    "troubleshooting.md": troubleshooting,
    "reference/report.md": report_reference,
    "reference/metrics.md": metrics_reference,
}
"""The pages in docs/ that are made from the code."""


def write() -> list[str]:
    """Make the pages in docs/ anew; the names of those that changed."""
    changed = []
    for name, make in MADE.items():
        path = ROOT / "docs" / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != make():
            path.write_text(make(), encoding="utf-8")
            changed.append(name)
    return changed


if __name__ == "__main__":
    print("\n".join(write()) or "nothing changed")
