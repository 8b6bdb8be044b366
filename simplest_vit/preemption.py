"""Signals that end a program: the first one is noted at once, a second SIGINT ends the process at once."""

import os
import signal
import threading
from collections.abc import Callable, Collection
from typing import Any


def watch(
    numbers: Collection[signal.Signals],
    *,
    note: Callable[[signal.Signals], Any] = lambda number: None,
    handler: Callable[[int, Any], Any] = lambda number, frame: None,
) -> Callable[[], None]:
    """Watch for some signals by a thread, for the main one may be deep in a compilation, or waiting for others.

    At a second SIGINT the process exits with 130. Others after the first signal pass: a scheduler sends SIGTERM to all
    processes, and one that has started others hands its own on to them.

    Args:
      numbers: The signals.
      note: Called by the thread with the first of them.
      handler: Called by the main thread with the first of them, once it runs Python again.

    Returns:
      A function that ends the watch and restores the handlers before it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def read() -> None:
        seen: set[int] = set()
        while received := os.read(reader, 1):
            number = received[0]
            if number not in numbers:
                continue
            if number == signal.SIGINT and number in seen:
                os._exit(128 + number)
            if not seen:
                note(signal.Signals(number))
            seen.add(number)

    handled = False

    def handle(number: int, frame: Any) -> None:
        nonlocal handled
        if not handled:
            handled = True
            handler(number, frame)

    # Python writes the number of a signal that has a handler to the pipe, whatever it is busy with.
    handlers = {number: signal.signal(number, handle) for number in numbers}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=read, name="signals", daemon=True)
    thread.start()

    def stop() -> None:
        signal.set_wakeup_fd(wakeup)
        for number, earlier in handlers.items():
            signal.signal(number, earlier)
        os.close(writer)
        thread.join()
        os.close(reader)

    return stop
