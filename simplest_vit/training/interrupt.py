"""Signals during training: the step reached is saved, by all processes of the run at the same one."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from simplest_vit import preemption


class Interruption:
    """Asks whether the run was told to stop.

    With several processes JAX takes SIGTERM and makes all of them stop after the same step; other signals are forwarded
    as SIGTERM.
    """

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        self._calls = 0

    @property
    def pending(self) -> bool:
        """Whether a signal came; with several processes always False, because they may only stop together."""
        return self._alone and preemption.received() is not None

    def reached(self) -> bool:
        """Return whether the run ends here. All processes must ask once after each step."""
        if self._alone:
            return self.pending
        # All stop at a call that none has made yet: a number that the steps of a resumed run would never be equal to.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Take the decision where to stop from the rest of the program."""

    def forward(number: signal.Signals) -> None:
        if jax.process_count() > 1 and number != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

    with preemption.deferred(forward):
        yield Interruption()
