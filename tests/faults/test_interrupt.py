"""SIGTERM and SIGINT, and what any exit leaves behind."""

import os
import pathlib
import re
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.faults.processes import ROOT, Run, assert_same_end

SCHEDULE = {"steps": 60, "eval_every": 10, "checkpoint_every": 20, "log_every": 7, "ema__decay": 0.9}
# What a run may print: its own lines, the table of parameters, and how it ended.
LINE = re.compile(r"\d\d:\d\d:\d\d  |preparing |[+|]|Total: |$|interrupted: ")


def shared_memory():
    return {path.name for path in pathlib.Path("/dev/shm").iterdir()}


def processes_of(run):
    """Processes that the run or its children started, found by a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SIMPLEST_VIT_TEST_RUN") == str(run.workdir):
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_nothing_left(run, before):
    deadline = time.monotonic() + 10
    while (processes_of(run) or shared_memory() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(run) == []
    assert shared_memory() - before == set()


def images(folder, side=16, sizes=(64, 40), **options):
    """An image folder of two classes that are streamed from the disk."""
    rng = np.random.default_rng(0)
    for split, size in zip(("train", "val"), sizes, strict=True):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(size):
                image = Image.fromarray(rng.integers(256, size=(16, 16, 3)).astype(np.uint8)).resize((side, side))
                image.save(folder / split / label / f"{i}.jpg", quality=95, **options)
    return {
        "data__name": "image_folder",
        "data__manual_dir": str(folder),
        "data__image_size": 16,
        "data__device_budget_bytes": 0,
        "data__num_workers": 2,
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    before = shared_memory()
    run = Run(folder / "run", data__dir=str(folder), **SCHEDULE)
    stderr = run.finish()
    assert [line for line in stderr.splitlines() if not LINE.match(line)] == []
    assert_nothing_left(run, before)
    return run.end(), str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "seconds", "number"),
    [
        ("", 2, signal.SIGTERM),  # imports
        ("parameters", 0, signal.SIGINT),  # compilation
        ("step 7/", 0, signal.SIGTERM),
        ("step 20/", 0, signal.SIGINT),  # evaluation
        ("step 60/", 0, signal.SIGTERM),  # the last evaluation
    ],
)
def test_a_signal_ends_the_run_with_75_and_the_same_command_goes_on(uninterrupted, tmp_path, text, seconds, number):
    end, data_dir = uninterrupted
    before = shared_memory()
    run = Run(tmp_path / "run", data__dir=data_dir, **SCHEDULE)
    code, stderr = run.stop(text, seconds, number)
    if (run.workdir / "results.json").exists():  # the signal came after the last evaluation
        assert (code, text) == (0, "step 60/")
    else:
        assert code == os.EX_TEMPFAIL, stderr
        assert re.search(r"^interrupted: .*rerun the command.*\n\Z", stderr, re.MULTILINE), stderr
    assert [line for line in stderr.splitlines() if not LINE.match(line)] == []
    assert_nothing_left(run, before)
    saved = run.finished_checkpoint()
    again = run.finish() if saved < 60 or code else ""
    assert (f"resuming at step {saved} of 60" in again) == (saved > 0 and bool(again))
    assert_same_end(run, end)


@pytest.mark.slow
def test_a_second_sigint_ends_the_process_at_once(uninterrupted, tmp_path):
    end, data_dir = uninterrupted
    run = Run(tmp_path / "run", data__dir=data_dir, **SCHEDULE)
    code, stderr = run.stop("parameters", 0.1, signal.SIGINT, signal.SIGINT)
    assert code == 128 + signal.SIGINT, stderr
    assert "Traceback" not in stderr
    run.finish()
    assert_same_end(run, end)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        ((), 0),
        ((signal.SIGTERM,), os.EX_TEMPFAIL),
        ((signal.SIGTERM, signal.SIGTERM), os.EX_TEMPFAIL),
        ((signal.SIGINT, signal.SIGINT), 128 + signal.SIGINT),
        ((signal.SIGKILL,), -signal.SIGKILL),
    ],
)
def test_the_processes_that_read_images_end_with_the_run(tmp_path, signals, expected):
    before = shared_memory()
    options = SCHEDULE | {"steps": 12, "eval_every": 12, "log_every": 1, "warmup_steps": 1, "batch_size": 32}
    options |= {"steps": 400, "log_every": 2} if signals else {}
    run = Run(tmp_path / "run", data__dir=str(tmp_path), **images(tmp_path / "images"), **options)
    code, stderr = run.stop("epoch", 0.02, *signals)  # the second comes before the first has been obeyed
    assert code == expected, stderr
    # A reader that was just starting may tell that its run is gone, Python that it has cleaned up shared memory.
    assert code not in (0, os.EX_TEMPFAIL) or "Traceback" not in stderr
    assert signals or [line for line in stderr.splitlines() if not LINE.match(line)] == []
    assert_nothing_left(run, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "seconds", "number"),
    [
        ("images are decoded in", 1, signal.SIGINT),  # the reader starts
        ("step 2/", 0.5, signal.SIGTERM),  # the run waits for it
    ],
)
def test_a_signal_to_all_processes_as_of_a_terminal_is_obeyed_by_the_run_alone(tmp_path, text, seconds, number):
    before = shared_memory()
    slow = images(tmp_path / "images", side=3000, sizes=(8, 1), progressive=True) | {"data__num_workers": 1}
    options = SCHEDULE | {"steps": 400, "log_every": 1, "warmup_steps": 1, "batch_size": 16}
    run = Run(tmp_path / "run", data__dir=str(tmp_path), **slow, **options)
    lines = []
    with subprocess.Popen(
        run.command, cwd=ROOT, env=run.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        while text not in "".join(lines[-1:]) and process.poll() is None:
            lines.append(process.stderr.readline())
        time.sleep(seconds)
        os.killpg(process.pid, number)
        stderr = "".join(lines) + process.stderr.read()
    assert process.returncode == os.EX_TEMPFAIL, stderr
    assert re.search(r"^interrupted: step \d+ of 400 is saved; .*\n\Z", stderr, re.MULTILINE), stderr
    assert [line for line in stderr.splitlines() if not LINE.match(line)] == []
    assert run.finished_checkpoint() > 0
    assert_nothing_left(run, before)
