"""Ties a process to the one that started it."""

from __future__ import annotations

import ctypes
from contextlib import suppress

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(number: int) -> None:
    """Have the system send this process the signal `number` when its parent ends, however that happens; on
    Linux. What this process then becomes by exec keeps it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
