"""Makes any end of a rank one that its launcher tells the others: a signal.

mpirun --with-ft ulfm tells the ranks when one of them was killed by a signal, but not when one exits with an
error's code, as by `os._exit(1)`: the others would wait for it. So the rank runs in a child process, and its
parent, which the launcher watches, ends as the child did, or by SIGKILL if the child left without a word.

When all ranks were killed, mpirun ends with 0, as if they had finished. So the last one of a job on one host
ends with an error's code instead: there is nobody left to tell.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from distrib import GUARD
from distrib.errors import EXIT_CRASH
from distrib.faults.parent import end_with_parent
from distrib.faults.signals import STOP_SIGNALS
from distrib.faults.watchdog import AT_JOBS_END

TOGETHER = b"1"
"""Written by a rank that leaves with all others."""


@contextmanager
def guarded() -> Iterator[None]:
    """Run the block, and what follows, in a child of this process, whose end becomes this one's.

    All ranks end the block together, or with the same error: then the exit code is passed on.
    """
    read_end, write_end = os.pipe()
    alive = _join_host()
    parent, child = os.getpid(), os.fork()
    if child:
        os.close(write_end)
        _end_like(child, read_end, alive)
    os.close(read_end)
    if alive is not None:
        os.close(alive)
    end_with_parent(signal.SIGKILL)  # if only that is killed
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    os.environ[GUARD] = str(parent)
    together = partial(os.write, write_end, TOGETHER)
    AT_JOBS_END.append(together)
    try:
        yield
    except SystemExit:  # of this rank alone
        raise
    except BaseException:  # which the others have, too, or which ends this process by a signal
        together()
        raise
    together()


def _join_host() -> int | None:
    """A file that the guards of all ranks have locked while they live; None of a job on several hosts."""
    ranks, here = (os.environ.get(f"OMPI_COMM_WORLD_{what}SIZE") for what in ("", "LOCAL_"))
    if ranks is None or ranks != here:
        return None
    with suppress(OSError, KeyError):  # in mpirun's own folder, which it removes
        alive = os.open(
            Path(os.environ["PMIX_SERVER_TMPDIR"]) / "distrib-guards", os.O_RDWR | os.O_CREAT, 0o600
        )
        fcntl.flock(alive, fcntl.LOCK_SH)
        return alive
    return None


def _is_last(alive: int | None) -> bool:
    """Whether no other guard is left."""
    if alive is None:
        return False
    fcntl.flock(alive, fcntl.LOCK_UN)  # of two that end at once, one must see the other gone
    with suppress(OSError):
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _end_like(child: int, read_end: int, alive: int | None) -> None:
    """Wait for `child`, which gets the launcher's signals itself; end as it did."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.read(read_end, 1):
        os._exit(os.WEXITSTATUS(status))
    if _is_last(alive):
        os._exit(EXIT_CRASH)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else int(signal.SIGKILL)
    with suppress(OSError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGKILL)  # if that one does not end a process
