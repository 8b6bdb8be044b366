"""SIGTERM and SIGINT during training: the run ends behind the step it is in; a second one ends the process at once."""

import os
import signal
import threading
import types
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Interruption:
    """Notes the first SIGTERM or SIGINT while it is entered; at the second the process exits with 128 + its number.

    Signals are read by a thread, for the main one may be deep in a compilation. With several processes JAX takes
    SIGTERM, has all of them stop behind the same step and lets further ones pass, for a cluster sends one to each;
    SIGINT is handed on as one, and only a second SIGINT ends a process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._calls = 0

    def __enter__(self) -> Self:
        self._alone = jax.process_count() == 1
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signals = (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,)
        # Python writes the number of a signal that has a handler to the pipe, whatever it is busy with.
        self._handlers: dict[int, Any] = {number: signal.signal(number, lambda *_: None) for number in signals}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _watch(self) -> None:
        while received := os.read(self._reader, 1):
            number = received[0]
            if number not in self._handlers:
                continue
            if self.signal is not None:
                os._exit(128 + number)
            self.signal = signal.Signals(number)
            if not self._alone:
                os.kill(os.getpid(), signal.SIGTERM)

    @property
    def pending(self) -> bool:
        """Whether a signal came; with several processes never, for they may only stop together."""
        return self._alone and self.signal is not None

    def reached(self) -> bool:
        """Whether the run ends here; to be asked once behind each step, by all processes."""
        if self._alone:
            return self.pending
        # All stop at a call that none has made yet: a number that the steps of a resumed run would never be equal to.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)
