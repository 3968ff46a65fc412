"""Schemathesis against the server by its own OpenAPI description: wrong and right requests, none of them a 5xx.

    python -m venv .schemathesis && .schemathesis/bin/pip install schemathesis
    python bench/serve_openapi.py --schemathesis .schemathesis/bin/schemathesis    # five minutes

Schemathesis has an environment of its own: its versions of the libraries that quantload's tests use are no concern of
theirs. `quantload serve` runs the demo model in a process of its own, with a key. Wrong are: a status of 500 or more, a
status or a body that the description does not have, a request accepted that the description forbids, one without the
key answered; one without an answer, unless it asks for so many tokens that it may take longer than the client waits.
Right requests that are refused (a text of no tokens, ids beyond the vocabulary: bounds that no schema
says) are counted apart. The script ends with 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from machine import describe_machine, headline
from result_files import RESULTS, write_result
from serve_process import KEY, serving

SECONDS = 300
PATIENCE = 180
"""Seconds that it waits for an answer."""
SLOWER = 3
"""How many times as long as alone, before, a token may take meanwhile."""
CONTEXT = 1024
"""That of the demo model: what is generated without a limit."""
EXCUSED = ("positive_data_acceptance", "max_response_time")
"""Checks that are counted and not wrong: refusals of what no schema can say, and the time, which is looked at apart."""


def command(program: Path, url: str, seconds: int, report: Path) -> list[str]:
    """Schemathesis for so many seconds; its report goes to `report`, one event a line."""
    return [
        str(program), "run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {KEY}",
        "--phases", "examples,coverage,fuzzing",
        "--checks", "all", 
        "--max-time", str(seconds), "--request-timeout", str(PATIENCE), "--continue-on-failure",
        "--report", "ndjson", "--report-ndjson-path", str(report), "--no-color",
    ]  # fmt: skip


def tokens_asked(body: dict[str, Any]) -> int:
    """How many tokens a request may make the server generate."""
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or CONTEXT
    return int((body.get("n") or 1) * prompts * min(limit, CONTEXT))


def seconds_per_token(url: str) -> float:
    """How long a token takes with nothing else to do, the mean of an answer of 64."""
    body = json.dumps({"prompt": "def ", "max_tokens": 64, "ignore_eos": True, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Authorization": f"Bearer {KEY}"})
    start = time.monotonic()
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        reply.read()
    return (time.monotonic() - start) / 64


def counted(report: Path) -> dict[str, Any]:
    """What a report holds: requests by operation and status, checks by name, those that failed with an example."""
    statuses: dict[str, Counter[str]] = {}
    checks: Counter[str] = Counter()
    failures: dict[str, dict[str, Any]] = {}
    unanswered: list[dict[str, Any]] = []
    version = ""
    for line in report.read_text().splitlines():
        event = json.loads(line)
        version = event.get("Initialize", {}).get("schemathesis_version", version)
        recorder = event.get("ScenarioFinished", {}).get("recorder", {})
        operation = recorder.get("label", "")
        for case, interaction in recorder.get("interactions", {}).items():
            response = interaction.get("response")
            status = "none" if response is None else str(response["status_code"])
            statuses.setdefault(operation, Counter())[status] += 1
            if response is None:
                body = recorder["cases"][case]["value"].get("body")
                tokens = tokens_asked(body) if isinstance(body, dict) else 0
                unanswered.append({"operation": operation, "tokens": tokens, "body": json.dumps(body)[:500]})
            for check in recorder.get("checks", {}).get(case, []):
                checks[check["name"]] += 1
                if check["status"] != "success":
                    body = recorder["cases"][case]["value"].get("body")
                    example = {"status": status, "body": json.dumps(body)[:500], "times": 0}
                    failures.setdefault(f"{check['name']}: {operation}", example)["times"] += 1
    return {
        "schemathesis": version,
        "requests": sum(counts.total() for counts in statuses.values()),
        "statuses": {operation: dict(sorted(counts.items())) for operation, counts in sorted(statuses.items())},
        "checks": dict(sorted(checks.items())),
        "failures": failures,
        "unanswered": unanswered,
    }


def wrong(result: dict[str, Any]) -> list[str]:
    """What must not have been: server errors, requests without an answer, failed checks, nothing tried at all."""
    found = [f"{name}: {one}" for name, one in result["failures"].items() if not name.startswith(EXCUSED)]
    for operation, counts in result["statuses"].items():
        found += [f"{operation}: {status}" for status in counts if status != "none" and status >= "500"]
    most = PATIENCE / (SLOWER * result["seconds_per_token"])
    found += [f"no answer: {one}" for one in result["unanswered"] if one["tokens"] < most]
    return found if result["requests"] else ["no request was made"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", type=Path, required=True, help="its program")
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = describe_machine()
    print(headline(machine))
    with tempfile.TemporaryDirectory() as folder, serving("--request-log", "off") as server:
        report = Path(folder) / "report.ndjson"
        rate = seconds_per_token(server.url)
        program = command(options.schemathesis, server.url, options.seconds, report)
        run = subprocess.run(program, capture_output=True, text=True, cwd=folder)
        if not report.exists():
            print(run.stdout, run.stderr, file=sys.stderr)
            return 1
        result = counted(report) | {"seconds_per_token": rate}
        code, seconds = server.stop()
    result["wrong"] = wrong(result) + ([] if code == 0 else [f"the server ended with {code} after {seconds:.1f} s"])
    reduced = "" if options.seconds >= SECONDS else "quick"
    path = write_result(
        "serve_openapi", {"machine": machine, "seconds": options.seconds, **result}, options.out, reduced
    )
    print(
        json.dumps(
            {name: result[name] for name in ("requests", "statuses", "failures", "unanswered", "wrong")}, indent=1
        )
    )
    print(path)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
