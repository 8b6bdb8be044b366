"""Signals that ask a program to stop: recorded when they arrive, acted on at safe points, never lost.

A signal does not raise an exception where it happens to arrive, because JAX swallows exceptions in its callbacks and
extension modules crash if their import is interrupted. Instead, a thread records it, whatever the main thread is doing.
Programs call `check` where they can stop. A program that reaches no such point within a few seconds has nothing to save
(except training, see `deferred`), so the thread ends the process. A second SIGINT ends it immediately.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from simplest_vit.errors import Interrupted

# Windows lacks the last two.
SIGNALS = tuple(s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"))
GRACE_S = 5.0  # time to reach a safe point


class _Watch:
    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.obeyed = False  # a safe point was reached and the program is stopping
        # Callers of `deferred`, which stop the program themselves.
        self.listeners: list[Callable[[signal.Signals], object]] = []
        self._reader, self._writer = socket.socketpair()  # on Windows `select` takes no pipes
        self._writer.setblocking(False)
        # `nohup` makes a program ignore SIGHUP; keep that.
        numbers = [n for n in SIGNALS if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]
        # Python writes the number of each signal that has a handler to the socket, whatever the main thread is doing.
        self._handlers = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Restore the previous handlers."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        interrupts, deadline = 0, None
        while True:
            timeout = None if deadline is None else max(deadline - time.monotonic(), 0)
            if select.select([self._reader], [], [], timeout)[0]:
                if not (byte := self._reader.recv(1)):
                    return
                if byte[0] not in SIGNALS:
                    continue
                number = signal.Signals(byte[0])
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    exit_now(128 + number)
                if self.received is None:
                    self.received, deadline = number, time.monotonic() + GRACE_S
                    for note in self.listeners:
                        note(number)
            else:
                deadline = None
                if not self.obeyed and not self.listeners:
                    os.write(2, f"interrupted: {_message(self.received)}\n".encode())
                    exit_now(Interrupted.exit_code)


_watch: _Watch | None = None


def install() -> None:
    """Watch for signals until the process ends; must be called by the main thread."""
    global _watch
    _watch = _watch or _Watch()


def received() -> signal.Signals | None:
    """Return the first signal received, or None."""
    return _watch.received if _watch else None


def check() -> None:
    """Mark a point at which the program can stop; raise Interrupted if a signal was received."""
    if _watch and _watch.received and not _watch.listeners:
        _watch.obeyed = True
        raise Interrupted(_message(_watch.received))


@contextlib.contextmanager
def deferred(note: Callable[[signal.Signals], object] = lambda number: None) -> Iterator[None]:
    """Let the caller stop the program: it polls `received` and may take its time to save.

    The thread calls `note` with the first signal, or immediately if a signal was already received.
    """
    global _watch
    own = None
    if _watch is None and threading.current_thread() is threading.main_thread():
        own = _watch = _Watch()
    watch = _watch
    if watch is None:  # in another thread, which cannot watch for signals
        yield
        return
    watch.listeners.append(note)
    if watch.received:
        note(watch.received)
    try:
        yield
    finally:
        watch.obeyed = watch.obeyed or watch.received is not None
        watch.listeners.remove(note)
        if own:
            _watch = None
            own.stop()


def _message(number: signal.Signals | None) -> str:
    return f"{number.name if number else 'signal'}; rerun the command"


def exit_now(code: int) -> NoReturn:
    """End the process and its children without waiting for anything."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
