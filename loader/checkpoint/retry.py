"""Which errors of a disk or a network may pass, and how long to wait for that."""

from __future__ import annotations

import errno
import time

TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR)
FIRST_DELAY = 0.01
"""Seconds; every further pause is twice as long as the one before."""
RETRIES = 4


def may_retry(error: OSError, failures: int, retries: int = RETRIES) -> bool:
    """Whether an error, one of so many `failures` in a row, may pass; after a pause if so."""
    if error.errno not in TRANSIENT or failures > retries:
        return False
    time.sleep(FIRST_DELAY * 2 ** (failures - 1))
    return True
