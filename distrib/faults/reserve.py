"""Sets aside what a rank needs to report that memory or file descriptors have run out."""

from __future__ import annotations

import mmap
import os


class Reserve:
    """Memory and file descriptors set aside, so that a rank can report that they have run out."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._files: list[int] = []

    def take(self) -> None:
        """Set them aside, once per process however many watchdogs it has."""
        if self._memory is None:
            self._memory = mmap.mmap(-1, RESERVED_BYTES)  # only address space, as nothing is written there
            files = range(RESERVED_FILES)
            self._files = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in files]

    def release(self) -> None:
        """Free them, for the traceback, the diagnosis and `end_launcher`."""
        memory, self._memory = self._memory, None
        files, self._files = self._files, []
        if memory is not None:
            memory.close()
        for file in files:
            os.close(file)


RESERVE = Reserve()
RESERVED_BYTES, RESERVED_FILES = 32 << 20, 8
"""A thread's stack takes 8 MiB of address space; a diagnosis opens four files, a child process three."""
