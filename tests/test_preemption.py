"""Signals, seen by real processes; those during training: `tests/faults/test_interrupt.py`."""

import os
import signal
import subprocess
import sys
import time

import pytest

from simplest_vit import preemption
from simplest_vit.errors import Interrupted


def send(number):
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while not preemption.received() and time.monotonic() < deadline:
        time.sleep(0.001)


def test_the_first_signal_is_noted_and_the_handlers_before_are_restored():
    noted, before = [], [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.deferred(noted.append):
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            send(number)
        preemption.check()  # is of others: who deferred stops by himself
        with preemption.deferred(noted.append):  # one that comes later hears of it immediately
            assert noted == [signal.SIGHUP, signal.SIGHUP]
        assert preemption.received() == signal.SIGHUP
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    assert preemption.received() is None
    preemption.check()


def run(body, number):
    """A program that sends itself a signal; its exit code, output and seconds."""
    program = (
        f"import os, signal, sys, time\nfrom simplest_vit import cli, preemption\npreemption.GRACE_S = 0.5\n{body}"
    )
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program, str(int(number))], capture_output=True, timeout=60)
    return ended.returncode, ended.stderr.decode(), time.monotonic() - start


SEND = "os.kill(os.getpid(), int(sys.argv.pop()))"


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_program_stops_at_its_next_safe_point(number):
    body = f"""
def program(arguments):
    {SEND}
    for i in range(1000):
        preemption.check()
        time.sleep(0.01)
cli.run(program, "", required=(), positional=True)"""
    assert run(body, number)[:2] == (75, f"interrupted: {number.name}; rerun the command\n")


@pytest.mark.parametrize(
    "waits", ["time.sleep(60)", "[None for _ in iter(int, 1)]", "__import__('threading').Event().wait()"]
)
def test_a_program_without_safe_points_is_ended(waits):
    code, error, seconds = run(f"preemption.install()\n{SEND}\n{waits}", signal.SIGTERM)
    assert (code, error) == (75, "interrupted: SIGTERM; rerun the command\n")
    assert seconds < 30


def test_who_defers_has_all_the_time_it_needs():
    body = f"""
preemption.install()
with preemption.deferred():
    {SEND}
    time.sleep(2)
    print("saved", preemption.received().name, file=sys.stderr)"""
    assert run(body, signal.SIGUSR1)[:2] == (0, "saved SIGUSR1\n")


def test_a_second_sigint_ends_immediately():
    body = f"preemption.install()\n{SEND.replace('.pop()', '[1]')}\ntime.sleep(0.2)\n{SEND}\ntime.sleep(60)"
    assert run(body, signal.SIGINT)[:2] == (130, "")


def test_what_nohup_ignores_stays_ignored():
    body = f"""
signal.signal(signal.SIGHUP, signal.SIG_IGN)
preemption.install()
{SEND}
time.sleep(1)
print(preemption.received(), file=sys.stderr)"""
    assert run(body, signal.SIGHUP)[:2] == (0, "None\n")


def test_a_safe_point_raises_interrupted(monkeypatch):
    class Watch:
        received, listeners, obeyed = signal.SIGTERM, [], False

    monkeypatch.setattr(preemption, "_watch", Watch)
    with pytest.raises(Interrupted, match="SIGTERM; rerun"):
        preemption.check()
    assert Watch.obeyed
