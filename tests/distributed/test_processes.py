"""Runs of two real processes with two fake devices each, over the loopback, beside one process with four."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simplest_vit import preemption
from simplest_vit.data.prepare import prepare
from tests.fork_server import xla_flags

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    "--config.batch_size=64",
    "--config.warmup_steps=2",
    "--config.log_every=1",
    "--config.eval_every=3",
    "--config.checkpoint_every=3",
    "--config.model.depth=4",
    "--config.model.width=16",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=32",
    "--config.model.c_val_0_target=0.3",
]
SHORT = [*TINY, "--config.steps=6"]
LONG = [*TINY, "--config.steps=400", "--config.log_every=10", "--config.eval_every=20", "--config.checkpoint_every=20"]
TIMEOUT = 240

pytestmark = pytest.mark.slow


def start(
    workdir,
    arguments,
    processes,
    devices,
    optimizer="adam",
    slurm=False,
    launchers=((), ()),
    own=((), ()),
    only=None,
    command="train",
):
    """Start all processes of a run, which write to `workdir`.N.err and .out; they find each other by flags or SLURM.

    Each has words of its own before its command (`launchers`) and after (`own`). With `only` the others are missing.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "main.py", command, "--config", f"configs/digits.py:optimizer={optimizer}"]
    command += ["--workdir", workdir, f"--config.data.dir={workdir.parent / 'tfds'}", *arguments]
    running = []
    for index in only or range(processes):
        several = [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}", f"--process_id={index}"]
        if slurm:
            several = ["--config.distributed=auto"]
            environment |= {
                "SLURM_JOB_ID": str(port),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(processes),
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
            }
        with open(f"{workdir}.{index}.out", "w") as out, open(f"{workdir}.{index}.err", "w") as err:
            running.append(
                subprocess.Popen(
                    [*launchers[index], *map(str, command), *(several if processes > 1 else []), *own[index]],
                    cwd=ROOT,
                    env=environment,
                    stdout=out,
                    stderr=err,
                )
            )
    return running


def text(workdir, index, stream="err"):
    return pathlib.Path(f"{workdir}.{index}.{stream}").read_text()


def wait_for(workdir, line):
    """Wait until the first process has said something."""
    deadline = time.monotonic() + TIMEOUT
    while line not in text(workdir, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert line in text(workdir, 0)


def finish(workdir, running):
    """Wait for the end of all processes; none may fail."""
    try:
        codes = [process.wait(TIMEOUT) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * len(running), text(workdir, 0) + text(workdir, len(running) - 1)


def train(workdir, arguments, processes, devices, optimizer="adam"):
    finish(workdir, start(workdir, arguments, processes, devices, optimizer))
    return json.loads((workdir / "results.json").read_text())


def curve(workdir, tag="loss/train"):
    events = EventAccumulator(str(workdir))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def assert_same_run(one, two, rtol=1e-5):
    losses = curve(one)
    assert sorted(losses) == list(range(1, 7))
    assert curve(two).keys() == losses.keys()
    np.testing.assert_allclose(list(curve(two).values()), list(losses.values()), rtol=rtol)
    np.testing.assert_allclose(
        list(curve(two, "loss/validation").values()), list(curve(one, "loss/validation").values()), rtol=rtol
    )


def test_two_processes_under_slurm_train_as_one_quick(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = [*SHORT, "--config.fsdp=2", "--config.ema.decay=0.9"]
    train(one, arguments, 1, 4)
    finish(two, start(two, arguments, 2, 2, slurm=True))
    results = json.loads((two / "results.json").read_text())
    assert results["device"].startswith("4 x cpu")
    assert_same_run(one, two)
    # Process 0 alone speaks and writes; checkpoints are written by both.
    assert "step 6/6" in text(two, 0)
    assert "data 2 x fsdp 2" in text(two, 0)
    assert "step " not in text(two, 1)
    assert "validation_accuracy" not in text(two, 1, "out")
    assert len(list(two.glob("events.out.*"))) == 1
    assert len(list((two / "checkpoints" / "6" / "state").glob("ocdbt.process_*"))) == 2


def test_two_processes_evaluate(tmp_path):
    two = tmp_path / "two"
    results = train(two, SHORT, 2, 2)
    finish(two, start(two, SHORT, 2, 2, command="evaluate"))
    evaluated = text(two, 0, "out")
    assert json.loads(evaluated[evaluated.index("{") :])["latest"]["validation_loss"] == results["validation_loss"]
    assert "validation_loss" not in text(two, 1, "out")

    running = start(two, SHORT, 2, 2, command="evaluate")
    try:
        wait_for(two, "validation: 360 images")
        running[0].send_signal(signal.SIGTERM)  # which JAX would take, to stop both after a step that never comes
        assert running[0].wait(TIMEOUT) == os.EX_TEMPFAIL, text(two, 0)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert "interrupted: SIGTERM" in text(two, 0)


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("adam", []),
        ("shampoo", ["--config.optimizer.precondition_frequency=2"]),
        ("adam", ["--config.data.device_budget_bytes=1"]),  # each process reads its own part of every batch from disk
    ],
)
def test_two_processes_train_as_one(tmp_path, optimizer, arguments):
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, [*SHORT, *arguments], 1, 4, optimizer)
    train(two, [*SHORT, *arguments], 2, 2, optimizer)
    assert_same_run(one, two, rtol=1e-4 if optimizer == "shampoo" else 1e-5)  # roots make rounding errors larger


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of a long run that nobody stopped."""
    return train(tmp_path_factory.mktemp("whole") / "run", LONG, 2, 2)


def start_and_wait_for(workdir, line):
    running = start(workdir, LONG, 2, 2)
    wait_for(workdir, line)
    assert not (workdir / "results.json").exists()
    return running


def assert_same_results(one, two):
    for name in ("validation_loss", "validation_accuracy", "best_validation_accuracy", "train_loss"):
        assert one[name] == two[name]


def assert_stopped_for_the_other(code, said):
    """By our line, or by JAX's where it finds first that no heartbeat comes."""
    assert code in (3, -signal.SIGABRT)
    assert "another process of the run was lost" in said or "another task died" in said, said


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_other_stops_and_the_restart_ends_equal(whole, tmp_path, victim):
    workdir = tmp_path / "run"
    running = start_and_wait_for(workdir, "step 50/")
    running[victim].send_signal(signal.SIGKILL)
    other = 1 - victim
    try:
        code = running[other].wait(120)  # and not for ever
    finally:
        for process in running:
            process.kill()
    assert_stopped_for_the_other(code, text(workdir, other))
    assert not (workdir / "results.json").exists()
    results = train(workdir, LONG, 2, 2)
    assert "resuming at step" in text(workdir, 0)
    assert_same_results(results, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_both_behind_the_same_step(whole, tmp_path, number):
    workdir = tmp_path / "run"
    running = start_and_wait_for(workdir, "step 10/")
    running[1].send_signal(number)
    try:
        codes = [process.wait(TIMEOUT) for process in running]
    finally:
        for process in running:
            process.kill()
    said = [text(workdir, index) for index in range(2)]
    assert codes == [os.EX_TEMPFAIL] * 2, said
    steps = [re.findall(r"^interrupted: step (\d+) of 400 is saved", each, re.MULTILINE) for each in said]
    assert steps[0] == steps[1]
    (step,) = steps[0]
    if number == signal.SIGTERM:  # once more, while the run that goes on is starting
        running = start_and_wait_for(workdir, "devices: ")
        running[1].send_signal(number)
        assert [process.wait(TIMEOUT) for process in running] == codes, text(workdir, 0)
        (step,) = re.findall(r"^interrupted: step (\d+) of 400 is saved", text(workdir, 0), re.MULTILINE)
    results = train(workdir, LONG, 2, 2)
    assert f"resuming at step {step} of 400" in text(workdir, 0)
    assert_same_results(results, whole)


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit (util-linux) limits the size of files")
@pytest.mark.parametrize("victim", [0, 1])
def test_where_the_disk_of_one_process_fails_both_stop(tmp_path, victim):
    workdir, other = tmp_path / "run", 1 - victim
    prepare("digits", tmp_path / "tfds")
    launchers = [(), ()]
    launchers[victim] = ("prlimit", f"--fsize={16 * 1024}")  # less than its part of a checkpoint
    running = start(workdir, [*SHORT, "--config.fsdp=2"], 2, 2, launchers=launchers)
    try:
        assert running[victim].wait(TIMEOUT) == 3
        code = running[other].wait(120)  # and not for the 20 minutes of Orbax
    finally:
        for process in running:
            process.kill()
    assert f"checkpoint in {workdir}/checkpoints cannot be written (File too large)" in text(workdir, victim)
    assert_stopped_for_the_other(code, text(workdir, other))
    train(workdir, [*SHORT, "--config.fsdp=2"], 2, 2)


def test_a_mistake_of_one_process_is_told_and_stops_both(tmp_path):
    running = start(tmp_path / "run", SHORT, 2, 2, own=((), ("--config.fsdp=3",)))
    try:
        assert running[1].wait(TIMEOUT) == 2
        code = running[0].wait(120)
    finally:
        for process in running:
            process.kill()
    assert "error: config.fsdp=3 does not divide the 4 devices" in text(tmp_path / "run", 1)
    assert "stack trace" not in text(tmp_path / "run", 1)
    assert_stopped_for_the_other(code, text(tmp_path / "run", 0))


def test_damaged_checkpoints_are_told_by_both(tmp_path):
    workdir = tmp_path / "run"
    train(workdir, SHORT, 2, 2)
    records = list((workdir / "checkpoints").glob("*/record.json"))
    for record in records:
        record.write_text("{")
    (workdir / "results.json").unlink()  # a finished run reads no checkpoint
    running = start(workdir, SHORT, 2, 2)
    assert [process.wait(TIMEOUT) for process in running] == [2, 2]
    for index in range(2):
        (line,) = [line for line in text(workdir, index).splitlines() if line.startswith("error: ")]
        assert f"every checkpoint in {workdir}/checkpoints is damaged (" in line
        assert "Traceback" not in text(workdir, index)
    assert list((workdir / "checkpoints").glob("*/record.json")) == records


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_waits_for_the_others_to_start(tmp_path, number):
    (running,) = start(tmp_path / "run", SHORT, 2, 2, only=(0,))
    deadline, found = time.monotonic() + TIMEOUT, []
    while psutil.CONN_LISTEN not in found and time.monotonic() < deadline:
        time.sleep(0.1)
        found = [each.status for each in psutil.Process(running.pid).net_connections()]
    time.sleep(1)
    running.send_signal(number)
    if number == signal.SIGINT:
        time.sleep(1)
        running.send_signal(number)
    assert running.wait(preemption.GRACE_S + 10) == {signal.SIGTERM: os.EX_TEMPFAIL, signal.SIGINT: 130}[number]
    assert "Traceback" not in text(tmp_path / "run", 0)
