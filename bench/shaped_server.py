"""A server for files in byte ranges, over HTTP/1.1 and as an S3 bucket, as slow and as far away as it is told to be.

    python bench/shaped_server.py FOLDER --rate 50e6 --latency 0.05

Prints its port. Every object of the bucket `bench` is a file of FOLDER. `GET /-/sent` says how many bytes of files were
sent and in how many answers, since the last time it was asked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bench"
CHUNK = 128 << 10


class Pace:
    """Lets bytes pass at a rate (bytes a second; 0: as fast as they go), whoever sends them."""

    def __init__(self, rate: float) -> None:
        self._rate, self._next, self._lock = rate, 0.0, threading.Lock()

    def let_pass(self, nbytes: int) -> None:
        """Wait until it is the turn of so many bytes."""
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + nbytes / self._rate
        if start > now:
            time.sleep(start - now)


class ShapedServer:
    """Serves files below `root`; rates in bytes a second for all and for each connection, latency in seconds."""

    def __init__(self, root: Path, rate: float, connection_rate: float, latency: float) -> None:
        self._root, self._pace, self._latency = root, Pace(rate), latency
        self._connection_rate = connection_rate
        self._sent = self._answers = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]

    def serve_forever(self) -> None:
        """Take connections until the process ends."""
        while True:
            connection, _ = self._listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        pace = Pace(self._connection_rate)
        with connection, connection.makefile("rb") as lines:
            try:
                while line := lines.readline():
                    method, target, _ = line.decode().split(" ", 2)
                    headers = dict(_headers(lines))
                    self._answer(connection, method, target, headers, pace)
            except OSError:
                return  # the client has left

    def _answer(self, connection: socket.socket, method: str, target: str, headers: dict[str, str], pace: Pace) -> None:
        parts = urlsplit(target)
        if parts.path == "/-/sent":
            with self._lock:
                said = {"bytes": self._sent, "answers": self._answers}
                self._sent = self._answers = 0
            _send(connection, 200, json.dumps(said).encode())
            return
        time.sleep(self._latency)
        query = parse_qs(parts.query)
        name = unquote(parts.path).lstrip("/").removeprefix(BUCKET).lstrip("/")
        if "list-type" in query or (method == "GET" and not name):
            _send(connection, 200, self._listing(query.get("prefix", [""])[0]))
            return
        file = self._root / name
        if not file.is_file():
            _send(connection, 404, b"<Error><Code>NoSuchKey</Code></Error>" if method == "GET" else b"")
            return
        self._send_file(connection, method, file, headers.get("range"), pace)

    def _send_file(self, connection: socket.socket, method: str, file: Path, wanted: str | None, pace: Pace) -> None:
        size = file.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        start, stop = (int(span[1]), min(int(span[2] or size - 1) + 1, size)) if span else (0, size)
        head = [
            f"HTTP/1.1 {206 if span else 200} OK",
            f"Content-Length: {stop - start}",
            "Content-Type: application/octet-stream",
            "Accept-Ranges: bytes",
            f'ETag: "{file.stat().st_mtime_ns:x}"',
            "Last-Modified: Sun, 29 Nov 2026 10:00:00 GMT",
        ]
        head += [f"Content-Range: bytes {start}-{stop - 1}/{size}"] if span else []
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        if method == "HEAD":
            return
        with self._lock:
            self._sent += stop - start
            self._answers += 1
        with file.open("rb") as opened:
            while start < stop:
                count = min(stop - start, CHUNK)
                self._pace.let_pass(count)
                pace.let_pass(count)
                start += os.sendfile(connection.fileno(), opened.fileno(), start, count)

    def _listing(self, prefix: str) -> bytes:
        names = sorted(str(path.relative_to(self._root)) for path in self._root.rglob("*") if path.is_file())
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-11-29T10:00:00.000Z</LastModified>"
            f"<ETag>&quot;x&quot;</ETag><Size>{(self._root / name).stat().st_size}</Size></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        return (
            f"<?xml version='1.0'?><ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'><Name>{BUCKET}</Name>"
            f"<IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        ).encode()


def _headers(lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    for line in lines:
        name, colon, value = line.decode().strip().partition(":")
        if not colon:
            return
        yield name.lower(), value.strip()


def _send(connection: socket.socket, status: int, body: bytes) -> None:
    head = f"HTTP/1.1 {status} Said\r\nContent-Length: {len(body)}\r\nContent-Type: application/xml\r\n\r\n"
    connection.sendall(head.encode() + body)


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, default=0.0, help="bytes a second over all connections; 0: no limit")
    parser.add_argument("--connection-rate", type=float, default=0.0, help="bytes a second over each connection")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    options = parser.parse_args()
    server = ShapedServer(options.folder, options.rate, options.connection_rate, options.latency)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
