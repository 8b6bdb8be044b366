"""The watch for signals; as real processes see it: `tests/faults/test_interrupt.py`."""

import os
import signal
import time

from simplest_vit import preemption


def test_the_first_signal_is_noted_and_handled_once_and_further_ones_pass():
    noted, handled = [], []
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = preemption.watch(
        (signal.SIGTERM, signal.SIGINT), note=noted.append, handler=lambda number, frame: handled.append(number)
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while not (noted and handled) and time.monotonic() < deadline:
        time.sleep(0.001)
    stop()  # ends its thread, which has read what came before
    assert (noted, handled) == ([signal.SIGTERM], [signal.SIGTERM])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
