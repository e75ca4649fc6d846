"""Brings the ranks together: at the start, and again after some of them have died (MPI's ULFM).

Each meeting has communicators of its own. Who hears of a death revokes them, so that all ranks hear of it;
then all take part in the next meeting. A meeting ends with an agreement, so that either all ranks have its
communicators or none.
"""

from __future__ import annotations

import os
from typing import Any

from distrib.comm.mpi import gathering, is_loss
from distrib.errors import LaunchError
from distrib.faults.watchdog import Watchdog

SUPPORT = "OMPI_MCA_mpi_ft_enable"
"""What mpirun --with-ft ulfm sets for the ranks."""


NO, YES, FAILING = 0, 1, 2
"""What ranks say in an agreement, which MPI takes bit by bit."""


class Meeting:
    """The communicators of all living ranks: one for small Python objects, two for arrays."""

    def __init__(self, base: Any, watchdog: Watchdog) -> None:
        """Meet the ranks of `base`, an mpi4py communicator, which is used for nothing else."""
        self._watchdog, self._asked = watchdog, False
        with watchdog.waiting("the meeting of all ranks"):
            while self._agree(YES if self._make(base) else NO) != YES:
                base = base.Shrink()

    def _make(self, base: Any) -> bool:
        """Make the communicators; whether this rank has them."""
        self.base, self.made = base, []
        try:
            for _ in range(3):
                self.made.append(base.Dup())
        except Exception as error:
            if not is_loss(error):
                raise
        return len(self.made) == 3

    def _agree(self, mine: int) -> int | None:
        """What all ranks say, bit by bit; None if one has died. All get the same answer, whoever dies."""
        try:
            return int(self.base.Agree(mine))
        except Exception as error:
            if not is_loss(error):
                raise
            return None

    @property
    def control(self) -> Any:
        return gathering(self.made[0])

    @property
    def pair(self) -> tuple[Any, Any]:
        return self.made[1], self.made[2]

    def ended(self) -> bool:
        """Whether all ranks have come to the end together. Else a rank has died, and all meet again."""
        self._asked = True
        with self._watchdog.waiting("the end of all ranks"):
            return self._agree(YES) == YES

    def all_fail(self) -> bool:
        """Whether no rank can go on: this one cannot. Else it must end, and the others meet again.

        Where a death leaves that open, it is asked again among the rest, as they try to meet.
        """
        self._revoke()
        with self._watchdog.waiting("the word of the other ranks"):
            said = None if self._asked else self._agree(FAILING)
            while said is None:
                self._make(self.base.Shrink())
                said = self._agree(FAILING)
        return said == FAILING

    def _revoke(self) -> None:
        for comm in (self.base, *self.made):
            comm.Revoke()

    def again(self) -> Meeting:
        """The meeting of the survivors, after a rank has died."""
        self._revoke()
        with self._watchdog.waiting("the meeting of the survivors"):
            if not self._asked:
                self._agree(NO)  # the answer to those in `ended` and `all_fail`
            return Meeting(self.base.Shrink(), self._watchdog)


def require_support() -> None:
    """LaunchError unless the launcher keeps ranks alive when others die. Call it before MPI starts."""
    # else MPI_Finalize hangs if all ranks of a host have died: its barrier waits for the host's launcher
    os.environ.setdefault("OMPI_MCA_async_mpi_finalize", "1")
    by_mpirun = os.environ.get("PMIX_NAMESPACE", "").startswith("prte")  # of srun: "slurm.pmix.JOB.STEP"
    if not by_mpirun or os.environ.get(SUPPORT, "0") not in ("1", "true"):
        raise LaunchError(
            "--elastic: this launcher ends all ranks when one dies: start them with mpirun --with-ft ulfm"
            " (Open MPI 5)"
        )
