"""Signals that end a program: the first one is noted at once, a second one ends the process at once."""

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

    At the second of them the process exits with 128 + its number.

    Args:
      numbers: The signals.
      note: Called by the thread with the first of them.
      handler: Called by the main thread with each of them, once it runs Python again.

    Returns:
      A function that ends the watch and restores the handlers before it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def read() -> None:
        noted = False
        while received := os.read(reader, 1):
            number = received[0]
            if number not in numbers:
                continue
            if noted:
                os._exit(128 + number)
            noted = True
            note(signal.Signals(number))

    # Python writes the number of a signal that has a handler to the pipe, whatever it is busy with.
    handlers = {number: signal.signal(number, handler) for number in numbers}
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
