"""From a URL to the files it stands for."""

from __future__ import annotations

import logging
import re

from ...addresses import HUB, OBJECT_STORES, parse_address, scheme_of
from ...errors import ModelNotFoundError, UnsupportedCheckpointError
from .client import Client
from .files import RemoteFiles
from .filesystems import FilesystemClient, known_schemes
from .hub import HubClient
from .objects import ObjectClient

logger = logging.getLogger("quantload")

_REPOSITORY = re.compile(r"(?i:hf)://(?:models/)?([\w.-]+/[\w.-]+?)(?:@(\S+))?/?")


def open_remote(given: str, revision: str | None) -> RemoteFiles | None:
    """The files of a remote folder; None for what is no URL. Of the hub alone something is asked already.

    Raises `ModelNotFoundError` for a URL that is none, `UnsupportedCheckpointError` for one that nothing here reads.
    """
    scheme = scheme_of(given)
    return None if scheme is None else RemoteFiles(_client(given, scheme, revision))


def _client(given: str, scheme: str, revision: str | None) -> Client:
    if scheme == HUB:
        return _hub_client(given, revision)
    try:
        address = parse_address(given)
    except ValueError as error:
        raise ModelNotFoundError(f"the model is a URL that cannot be read: {error}") from None
    if revision is not None:
        logger.warning("%s has no revisions: %r is not looked at", address.shown, revision)
    if address.fault is not None:
        raise ModelNotFoundError(address.fault)
    if scheme in OBJECT_STORES:
        return ObjectClient(address)
    others = known_schemes()
    if scheme in others:
        return FilesystemClient(given, address.shown)
    known = ", ".join(f"{each}://" for each in (*OBJECT_STORES, HUB))
    raise UnsupportedCheckpointError(
        f"{address.shown}: nothing here reads {scheme}://; give one of {known}, or of fsspec's: {', '.join(others)}"
    )


def _hub_client(given: str, revision: str | None) -> HubClient:
    match = _REPOSITORY.fullmatch(given)
    if match is None or match[1].split("/")[0] in ("datasets", "spaces", "buckets"):
        raise ModelNotFoundError(
            f"{given!r} is no address of a model; give hf://owner/name, or hf://owner/name@revision"
        )
    repo, named = match[1], match[2]
    if named is not None and revision is not None and named != revision:
        raise ModelNotFoundError(f"{given!r} names the revision {named!r}, and {revision!r} was asked for; give one")
    return HubClient(repo, named or revision)
