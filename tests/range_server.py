"""A small server for tests: files of a folder in byte ranges, as web servers and S3 send them, and what goes wrong."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Asked(NamedTuple):
    """A request: how often the same one has come before, and the headers by their names in lower case."""

    method: str
    path: str
    start: int
    stop: int
    before: int
    headers: dict[str, str]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer: a status in its place, or the end of the bytes after so many of them."""

    status: int | None = None
    body: bytes = b"<Error><Code>SlowDown</Code><Message>token=hunter2</Message></Error>"
    after: int = 0
    how: str = "close"
    """`close`, `reset` or `stall`; `shift` sends another range, `whole` the file from its first byte on."""
    seconds: float = 0.0


@dataclass
class RangeServer:
    """Serves `root` on a free local port. `fault` says what goes wrong with a request, `latency` is in seconds.

    A name below `bucket` is an object of S3, which can be listed unless `lists` is false. Each folder NAME is also the
    repository org/NAME of a hub, whose only commit is `COMMIT`; with `redirects` it sends clients to another host.
    """

    root: Path
    bucket: str = "bucket"
    fault: Callable[[Asked], Fault | None] = lambda asked: None
    latency: float = 0.0
    lists: bool = True
    etags: bool = True
    of_times: bool = False
    """Whether ETags are made of times and sizes alone, as those of many web servers are, and not of inodes, too."""
    redirects: bool = False
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._left = threading.Event()
        self._parts: dict[str, dict[int, bytes]] = {}
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._left.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    @property
    def url(self) -> str:
        """Of the folder, for HTTP."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes clients of S3 ask here, with credentials that nobody may see."""
        return {
            "AWS_ENDPOINT": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIDHUNTER2",
            "AWS_SECRET_ACCESS_KEY": "hunter2",
        }

    def of_hub(self) -> dict[str, object]:
        """What `huggingface_hub.constants` must have for the hub to be this server."""
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        return {"HF_HUB_OFFLINE": False, "ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}

    def bytes_asked(self, suffix: str = ".safetensors") -> int:
        """Bytes of all ranges of files with such names that were asked for."""
        return sum(each.stop - each.start for each in self.asked if each.path.endswith(suffix))

    def _accept(self) -> None:
        while not self._left.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                method, target, _ = line.decode().split(" ", 2)
                headers = dict(self._headers(lines))
                body = lines.read(int(headers.get("content-length", 0)))
                time.sleep(self.latency)
                answered = (
                    self._take(connection, method, target, headers, body)
                    if method in ("PUT", "POST")
                    else self._answer(connection, method, target, headers)
                )
                if not answered:
                    return

    @staticmethod
    def _headers(lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
        for line in lines:
            name, colon, value = line.decode().strip().partition(":")
            if not colon:
                return
            yield name.lower(), value.strip()

    def _answer(self, connection: socket.socket, method: str, target: str, headers: dict[str, str]) -> bool:
        """Whether the connection goes on."""
        parts = urlsplit(target)
        path = unquote(parts.path).removeprefix("/")
        query = parse_qs(parts.query)
        if "list-type" in query:
            return self._list(connection, path.rstrip("/"), query)
        if path.startswith("api/models/org/"):
            return self._repository(connection, path)
        of_hub = re.fullmatch(rf"(?:org|signed)/([^/]+)/resolve/{COMMIT}/(.+)", path)
        if self.redirects and of_hub and path.startswith("org/"):
            self.asked.append(Asked(method, path, 0, 0, 0, headers))
            elsewhere = self.url.replace("127.0.0.1", "localhost")
            self._head(connection, 302, 0, [f"Location: {elsewhere}/signed{target[4:]}?sig=hunter2"])
            return True
        file = self.root / ("/".join(of_hub.groups()) if of_hub else path.removeprefix(f"{self.bucket}/"))
        status = file.stat() if file.is_file() else None
        size = status.st_size if status is not None else 0
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        start, stop = (int(span[1]), min(int(span[2] or size) + 1, size)) if span else (0, size)
        with self._lock:
            before = sum((each.path, each.start) == (path, start) for each in self.asked)
            asked = Asked(method, path, start, max(stop, start), before, headers)
            self.asked.append(asked)
        fault = self.fault(asked)
        if fault is not None and fault.status is not None:
            return self._send(connection, fault.status, fault.body)
        if status is None:
            return self._send(connection, 404, b"")
        etag = f'"{0 if self.of_times else status.st_ino:x}-{status.st_mtime_ns:x}-{size:x}"'
        if headers.get("if-match", etag) != etag:
            return self._send(connection, 412, b"")
        if start >= size:
            return self._send(connection, 416, b"")
        if fault is not None and fault.how == "whole":
            return self._send(connection, 200, file.read_bytes())
        shift = 1 if fault is not None and fault.how == "shift" else 0
        more = [f"Content-Range: bytes {start + shift}-{stop - 1 + shift}/{size}"] if span else []
        more += ["Last-Modified: Sun, 29 Nov 2026 10:00:00 GMT"] if method == "HEAD" else []
        more += [f"ETag: {etag}"] if self.etags else []
        with file.open("rb") as opened:
            opened.seek(start)
            body = memoryview(opened.read(stop - start))
        self._head(connection, 206 if span else 200, len(body), more)
        return self._body(connection, body if method == "GET" else body[:0], fault if not shift else None)

    def _body(self, connection: socket.socket, body: memoryview, fault: Fault | None) -> bool:
        if fault is None:
            connection.sendall(body)
            return True
        connection.sendall(body[: fault.after])
        if fault.how == "stall":
            self._left.wait(fault.seconds)
        if fault.how == "slow":
            for at in range(fault.after, len(body), 65536):
                connection.sendall(body[at : at + 65536])
                self._left.wait(fault.seconds)
            return True
        if fault.how == "reset":  # what was sent and not read yet is lost with it
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _take(self, connection: socket.socket, method: str, target: str, headers: dict[str, str], body: bytes) -> bool:
        """An object is uploaded, at once or in parts."""
        parts = urlsplit(target)
        path, query = (
            unquote(parts.path).removeprefix(f"/{self.bucket}/"),
            parse_qs(parts.query, keep_blank_values=True),
        )
        asked = Asked(method, path, 0, len(body), sum(each.path == path for each in self.asked), headers)
        self.asked.append(asked)
        fault = self.fault(asked)
        if fault is not None and fault.status is not None:
            return self._send(connection, fault.status, fault.body)
        if "uploads" in query:
            xml = "<InitiateMultipartUploadResult><UploadId>one</UploadId></InitiateMultipartUploadResult>"
            return self._send(connection, 200, xml.encode())
        if "partNumber" in query:
            self._parts.setdefault(path, {})[int(query["partNumber"][0])] = body
            self._head(connection, 200, 0, ['ETag: "part"'])
            return True
        content = b"".join(part for _, part in sorted(self._parts.pop(path, {}).items())) if method == "POST" else body
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        status = file.stat()
        etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'
        xml = f"<CompleteMultipartUploadResult><ETag>{escape(etag)}</ETag></CompleteMultipartUploadResult>"
        body = xml.encode() if method == "POST" else b""
        self._head(connection, 200, len(body), [f"ETag: {etag}"])
        connection.sendall(body)
        return True

    def _repository(self, connection: socket.socket, path: str) -> bool:
        name, _, revision = path.removeprefix("api/models/org/").partition("/revision/")
        folder = self.root / name
        if not folder.is_dir() or revision not in ("", "main", COMMIT):
            self._head(
                connection, 404, 0, [f"X-Error-Code: {'RevisionNotFound' if folder.is_dir() else 'RepoNotFound'}"]
            )
            return True
        names = sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())
        said = {"id": f"org/{name}", "sha": COMMIT, "siblings": [{"rfilename": each} for each in names]}
        return self._send(connection, 200, json.dumps(said).encode())

    def _list(self, connection: socket.socket, bucket: str, query: dict[str, list[str]]) -> bool:
        if bucket != self.bucket:
            return self._send(connection, 404, b"<Error><Code>NoSuchBucket</Code><Message>hunter2</Message></Error>")
        if not self.lists:
            return self._send(connection, 403, b"<Error><Code>AccessDenied</Code></Error>")
        prefix = query.get("prefix", [""])[0]
        names = sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-11-29T10:00:00.000Z</LastModified>"
            f"<Size>{(self.root / name).stat().st_size}</Size></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        return self._send(connection, 200, body.encode())

    def _send(self, connection: socket.socket, status: int, body: bytes) -> bool:
        self._head(connection, status, len(body), [])
        connection.sendall(body)
        return True

    @staticmethod
    def _head(connection: socket.socket, status: int, length: int, more: list[str]) -> None:
        lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {length}", *more, "", ""]
        connection.sendall("\r\n".join(lines).encode())
