"""The plan for a GPU, run by stand-ins, and its commands."""

import importlib.util
import sys
import time

import pytest

from benchmarks import gpu
from benchmarks.protocols import TABLES


@pytest.mark.parametrize("toy", [False, True])
def test_every_part_is_a_program_of_the_repository(tmp_path, toy):
    parts = gpu.plan(tmp_path, "/data", toy)
    assert list(parts) == ["kernel", "step", "s4", "optimizers", "headline"]
    for command in parts.values():
        assert command[:2] == [sys.executable, "-m"]
        assert importlib.util.find_spec(command[2])
    assert parts["s4"][3] in TABLES
    assert ("--check" in parts["s4"]) is toy
    assert "--data_dir=/data" in parts["headline"]


def test_a_part_leaves_its_lines_and_is_told_to_stop_when_the_time_is_over(tmp_path, capsys):
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('begun', flush=True); "
    good = gpu.run("good", [sys.executable, "-c", "print('a line')"], tmp_path, time.monotonic() + 60)
    late = gpu.run("late", [sys.executable, "-c", program + "time.sleep(60)"], tmp_path, time.monotonic() + 3)
    assert (good, late) == (True, False)
    assert (tmp_path / "good.log").read_text() == "a line\n"
    output = capsys.readouterr().out
    assert "a line" in output
    assert "== late: exit code 75" in output


def test_parts_that_are_not_reached_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "plan", lambda *_: {name: [sys.executable, "-c", ""] for name in "ab"})
    monkeypatch.setattr("sys.argv", ["gpu", "--workdir", str(tmp_path), "--minutes", "0"])
    with pytest.raises(SystemExit, match="True"):
        gpu.main()
    assert capsys.readouterr().out.splitlines() == [f"== {name}: not started, time is up" for name in "ab"]
    monkeypatch.setattr("sys.argv", ["gpu", "--workdir", str(tmp_path), "--parts", "c"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "--parts: unknown c; expected some of a, b" in capsys.readouterr().err
