"""A server in a process of its own, as a user starts it, and what it holds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

KEY = "a-key-that-must-not-be-logged"
READY_SECONDS = 180.0
STOP_SECONDS = 20.0


@dataclass
class Held:
    """What a server's process holds: resident bytes, descriptors, threads."""

    rss_bytes: int
    descriptors: int
    threads: int

    @staticmethod
    def of(process: psutil.Process) -> Held:
        """Now."""
        with process.oneshot():
            return Held(process.memory_info().rss, process.num_fds(), process.num_threads())


@dataclass
class Server:
    """`quantload serve` of the demo model with a key, its log as JSON lines."""

    process: subprocess.Popen[str]
    url: str
    port: int
    log: list[dict[str, Any]] = field(default_factory=list)
    noise: list[str] = field(default_factory=list)
    """Lines of the log that are no JSON object."""

    def held(self) -> Held:
        """What the process holds now."""
        return Held.of(psutil.Process(self.process.pid))

    def stop(self) -> tuple[int, float]:
        """End it with SIGTERM; its exit code, and how long that took in seconds."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return code, time.monotonic() - start


@contextmanager
def serving(*options: str) -> Iterator[Server]:
    """A server that is ready, until the block ends. Raises `RuntimeError` if it does not get so far."""
    command = [sys.executable, "-m", "quantload", "serve", "--port", "0", "-q", "quark_mxfp4", "--log-format", "json"]
    environment = {**os.environ, "QUANTLOAD_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
    server = Server(process, "", 0)
    ready = threading.Event()
    reader = threading.Thread(target=_read, args=(server, ready), daemon=True)
    reader.start()
    try:
        if not ready.wait(READY_SECONDS) or not server.port:
            raise RuntimeError(f"the server did not start: {[*server.noise, *server.log][-5:]}")
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(5)


def _read(server: Server, ready: threading.Event) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        try:
            entry = json.loads(line)
        except ValueError:
            server.noise.append(line.rstrip("\n"))
            continue
        server.log.append(entry)
        found = re.fullmatch(r"Serving \S+ at (http://\S+:(\d+))", entry["message"])
        if found:
            server.url, server.port = found[1], int(found[2])
            ready.set()
    ready.set()
