"""SIGTERM and SIGINT during training: the run ends after the step it is in, at a second SIGINT at once."""

import os
import signal
import types
from typing import Self

import jax
from jax.experimental import multihost_utils

from simplest_vit import preemption


class Interruption:
    """Notes the first SIGTERM or SIGINT while it is entered; a second SIGINT ends the process (`preemption.watch`).

    With several processes JAX takes SIGTERM and has all of them stop after the same step; SIGINT is handed on as one.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._calls = 0

    def __enter__(self) -> Self:
        self._alone = jax.process_count() == 1
        numbers = (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,)
        self._stop = preemption.watch(numbers, note=self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._stop()

    def _note(self, number: signal.Signals) -> None:
        self.signal = number
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def pending(self) -> bool:
        """Whether a signal came; with several processes never, for they may only stop together."""
        return self._alone and self.signal is not None

    def reached(self) -> bool:
        """Whether the run ends here; to be asked once after each step, by all processes."""
        if self._alone:
            return self.pending
        # All stop at a call that none has made yet: a number that the steps of a resumed run would never be equal to.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)
