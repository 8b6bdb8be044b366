import io
import logging
import os
import sys
import termios

import jax
import pytest

import simplest_vit
from simplest_vit.training.metrics import progress_bar
from tests.tiny import tiny_config


def open_terminal(monkeypatch, columns=160):
    """Replace standard error by the text that is written to a terminal.

    In the test itself, because pytest replaces the streams between fixtures and tests.
    """
    _, number = os.openpty()
    termios.tcsetwinsize(number, (30, columns))
    terminal = io.StringIO()
    terminal.fileno = lambda: number
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


REPORT = {"epoch": 1.5, "train_loss": 0.25, "train_accuracy": 0.75, "skipped_steps": 0.0}
REPORT |= {"step_time": 0.1, "steps_per_second": 10.0, "images_per_second": 640.0}


def test_a_run_on_a_terminal_has_a_bar_and_prints_evaluations_above_it(
    capsys, monkeypatch, tmp_path, data_dir, two_devices
):
    terminal = open_terminal(monkeypatch)
    simplest_vit.train(tiny_config(data__dir=data_dir, log_every=1), tmp_path / "run")
    shown = terminal.getvalue()
    assert "| 6/6 [" in shown
    assert ", epoch 0." in shown
    assert "  loss " in shown.splitlines()[-1]
    printed = capsys.readouterr().out
    assert "step 6  validation loss" in printed
    assert "step 6/6" not in printed + shown, "the bar shows the reports"


def test_a_resumed_bar_starts_at_its_step(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with progress_bar(40, 50) as bar:
        bar.report(40, REPORT)
        for _ in range(10):
            bar.update()
    first, last = terminal.getvalue().split("\r")[1], terminal.getvalue().split("\r")[-1]
    assert " 80%|" in first
    assert " 40/50 [" in first
    assert last.endswith("step/s, epoch 1.5  loss 0.2500  accuracy 75.00%  640 images/s]\n")


@pytest.mark.parametrize("reason", ["no terminal", "size unknown", "CI", "another process"])
def test_elsewhere_reports_are_lines(reason, monkeypatch, caplog):
    open_terminal(monkeypatch, 0 if reason == "size unknown" else 160)
    caplog.set_level(logging.INFO, "simplest_vit")
    monkeypatch.setattr(logging.getLogger("simplest_vit"), "propagate", True)
    if reason == "no terminal":
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    if reason == "CI":
        monkeypatch.setenv("CI", "true")
    if reason == "another process":
        monkeypatch.setattr(jax, "process_index", lambda: 1)
    with progress_bar(0, 50) as bar:
        bar.update()
        bar.report(1, REPORT)
    assert sys.stderr.getvalue() == ""
    line = "step 1/50 (2.0%)  epoch 1.5  loss 0.2500  accuracy 75.00%  640 images/s  10 steps/s  ETA 0:00:05"
    assert caplog.messages == [line]
