"""Addresses of remote checkpoints, and what may be shown of them."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

OBJECT_STORES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "http", "https")
"""Schemes that `obstore` knows."""
HUB = "hf"
_BUCKET, _CONTAINER, _HOST = ("bucket", "BUCKET/PREFIX"), ("container", "CONTAINER/PREFIX"), ("host", "HOST/PATH")
_ACCOUNT = ("account", "CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX")
_FORMS = {
    **dict.fromkeys(("s3", "s3a", "gs"), _BUCKET),
    **dict.fromkeys(("az", "azure", "adl"), _CONTAINER),
    **dict.fromkeys(("abfs", "abfss"), _ACCOUNT),
    **dict.fromkeys(("http", "https"), _HOST),
}
"""What an address names first, by its scheme, and how all of it goes on."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_SIGNED = re.compile(
    r"(?i)((?:[\w-]*(?:signature|credential|security-token|secret|password|token|access[-_]?key[\w-]*)|\bsig|authorization)"
    r"[\"']?\s*[=:]\s*)((?:bearer|basic)\s+)?[^\s&\"',;<>]+"
)


class Address(NamedTuple):
    """A remote folder.

    `url` is for a client, without the `user` and the `password` that were in it; `shown` is for people and reports: no
    user, no password and no query, which is where signed addresses carry their signature.
    """

    scheme: str
    url: str
    shown: str
    user: str | None
    password: str | None

    @property
    def fault(self) -> str | None:
        """Why it is none of an object store or a web server, and which form it should have; None for one that is."""
        if self.scheme not in _FORMS or urlsplit(self.url).hostname:
            return None
        place, form = _FORMS[self.scheme]
        return f"{self.shown} names no {place}; give an address of the form {self.scheme}://{form}"


def scheme_of(given: str) -> str | None:
    """The scheme of a URL in lower case; None for what is none."""
    match = _SCHEME.match(given)
    return match[1].lower() if match else None


def parse_address(given: str) -> Address:
    """The parts of a URL."""
    parts = urlsplit(given.strip())
    host = parts.netloc.rpartition("@")[2]
    path = parts.path.rstrip("/")
    bare = f"{parts.scheme.lower()}://{host}{path}"
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    if user is not None and parts.scheme.lower() in ("abfs", "abfss"):  # the container, no user
        bare, host, user = f"{parts.scheme.lower()}://{parts.netloc}{path}", parts.netloc, None
    url = urlunsplit((parts.scheme.lower(), host, path, parts.query, ""))
    return Address(parts.scheme.lower(), url, bare, user, password)


def shown_address(given: str) -> str:
    """A model as somebody typed it, to be shown: a URL without user, password and query; all else as it is."""
    if scheme_of(given) is None:
        return given
    try:
        return parse_address(given).shown
    except ValueError:
        return "***"


def without_credentials(text: str) -> str:
    """A text without what may let somebody in: users, passwords and queries of URLs, and what looks like a key."""
    return _SIGNED.sub(r"\1***", _IN_TEXT.sub(_bare, text))


def _bare(match: re.Match[str]) -> str:
    text = match[0].rstrip(",.;)'\"")
    tail = match[0][len(text) :]
    try:
        return parse_address(text).shown + ("?***" if "?" in text else "") + tail
    except ValueError:
        return "***" + tail
