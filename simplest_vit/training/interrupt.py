"""Signals during training: all processes of the run save the same step."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from simplest_vit import preemption


class Interruption:
    """Reports whether the run should stop.

    With several processes, JAX handles SIGTERM and makes all of them stop after the same step; other signals are
    forwarded as SIGTERM.
    """

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        self._calls = 0

    @property
    def pending(self) -> bool:
        """Whether a signal was received; always False with several processes, which must stop together."""
        return self._alone and preemption.received() is not None

    def reached(self) -> bool:
        """Return whether the run must stop here. All processes must call this once after each step."""
        if self._alone:
            return self.pending
        # JAX stops all processes at a call that none has made yet. It counts calls, and the steps of a resumed run
        # would never match that count.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """Defer signals, so that they stop the run only at the end of a step."""

    def forward(number: signal.Signals) -> None:
        if jax.process_count() > 1 and number != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

    with preemption.deferred(forward):
        yield Interruption()
