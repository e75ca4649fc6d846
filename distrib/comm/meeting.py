"""Brings the ranks together: at the start, and again after some of them have died (MPI's ULFM).

Each meeting has one communicator. Who hears of a death revokes it, so that all ranks hear of it; then all
take part in the next meeting. A meeting ends with an agreement, so that all ranks have its communicator or
none. It is not duplicated: Open MPI 5.0.11 may crash if it hears of a death while it makes a communicator.
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


MOST_IN_VAIN = 2
"""Meetings that may miss nobody, one after another: a death may be heard of late, but an error may stay."""


class Meeting:
    """The communicator of all living ranks, for small Python objects and for arrays."""

    def __init__(self, comm: Any, watchdog: Watchdog) -> None:
        """Meet the ranks of `comm`, an mpi4py communicator that nobody else uses."""
        self.comm, self._watchdog, self._asked = comm, watchdog, False
        self._in_vain = 0  # meetings up to this one that missed nobody
        with watchdog.waiting("the meeting of all ranks"):
            while self._agree(YES) != YES:
                self.comm = self.comm.Shrink()

    def _agree(self, mine: int) -> int | None:
        """What all ranks say, bit by bit; None if one has died. All get the same answer, whoever dies."""
        try:
            return int(self.comm.Agree(mine))
        except Exception as error:
            if not is_loss(error):
                raise
            return None

    @property
    def control(self) -> Any:
        return gathering(self.comm)

    def ended(self) -> bool:
        """Whether all ranks have come to the end together. Else a rank has died, and all meet again."""
        self._asked = True
        self._watchdog.forget_loss()
        with self._watchdog.waiting("the end of all ranks"):
            return self._agree(YES) == YES

    def all_fail(self) -> bool:
        """Whether no rank can go on: this one cannot. Else it must end, and the others meet again.

        Where a death leaves that open, it is asked again among the rest, as they try to meet.
        """
        self._watchdog.forget_loss()
        self.comm.Revoke()
        with self._watchdog.waiting("the word of the other ranks"):
            said = None if self._asked else self._agree(FAILING)
            while said is None:
                self.comm = self.comm.Shrink()
                said = self._agree(FAILING)
        return said == FAILING

    def again(self) -> Meeting:
        """The meeting of the survivors, after a rank has died."""
        self._watchdog.forget_loss()
        self.comm.Revoke()
        with self._watchdog.waiting("the meeting of the survivors"):
            if not self._asked:
                self._agree(NO)  # the answer to those in `ended` and `all_fail`
            found = Meeting(self.comm.Shrink(), self._watchdog)
        if found.comm.Get_size() == self.comm.Get_size():
            found._in_vain = self._in_vain + 1
        if found._in_vain > MOST_IN_VAIN:
            raise RuntimeError("MPI fails again and again, though no rank has died")
        return found


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
