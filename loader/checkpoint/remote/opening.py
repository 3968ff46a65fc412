"""From a URL to the files it stands for."""

from __future__ import annotations

import logging

from ...errors import CheckpointError, UnsupportedCheckpointError
from .address import OBJECT_STORES, parse_address, scheme_of
from .client import Client
from .files import RemoteFiles
from .objects import ObjectClient

logger = logging.getLogger("quantload")


def open_remote(given: str, revision: str | None) -> RemoteFiles | None:
    """The files of a remote folder; None for what is no URL. Nothing is asked for yet.

    Raises `CheckpointError` for a URL that is none, `UnsupportedCheckpointError` for one that nothing here reads.
    """
    scheme = scheme_of(given)
    if scheme is None:
        return None
    try:
        address = parse_address(given)
    except ValueError as error:
        raise CheckpointError(f"the model is a URL that cannot be read: {error}") from None
    if scheme not in OBJECT_STORES:
        known = ", ".join(f"{each}://" for each in OBJECT_STORES)
        raise UnsupportedCheckpointError(f"{address.shown}: nothing here reads {scheme}://; give one of {known}")
    if revision is not None:
        logger.warning("%s has no revisions: %r is not looked at", address.shown, revision)
    client: Client = ObjectClient(address)
    return RemoteFiles(client)
