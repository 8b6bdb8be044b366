"""SIGKILL at random moments: nothing before the last finished checkpoint is lost, and the end is bit-equal."""

import collections
import random
import re
import signal

import pytest

from tests.faults.processes import Run, assert_same_end

# Most of the time no checkpoint is being written.
ADAM = {"arguments": "optimizer=adam", "steps": 2000, "eval_every": 10, "checkpoint_every": 200, "log_every": 5}
# Every part of a training in it: SAM on every second step, an average, Shampoo with roots that are 4 steps old.
EVERYTHING = ADAM | {
    "arguments": "optimizer=shampoo",
    "optimizer__precondition_frequency": 4,
    "sam__rho": 0.05,
    "sam__every": 2,
    "ema__decay": 0.9,
    "ema__every": 2,
    "model__dropout": 0.1,
    "steps": 600,
    "checkpoint_every": 60,
}


def phase(run, stderr):
    """Where a killed process was, by what it had printed last and what is on the disk."""
    lines = [line for line in stderr.splitlines() if re.match(r"\d\d:\d\d:\d\d", line)]
    if not lines:
        return "import"
    if run.being_written():
        return "checkpoint"
    if "epoch" not in stderr and "validation" not in stderr:
        return "compilation"
    last_step = int(re.findall(r"step (\d+)", lines[-1])[-1])
    if "epoch" in lines[-1] and last_step % run.config.eval_every == 0:
        return "evaluation"
    return "training"


def assert_resumed(run, stderr, checkpoint):
    """A start, if it came so far, went on from a checkpoint, or repeated the results of a run that had finished."""
    if "has finished" in stderr:
        assert checkpoint == run.config.steps
    elif "parameters" in stderr:
        found = re.search(r"resuming at step (\d+)", stderr)
        assert int(found[1] if found else 0) == checkpoint, "progress up to a finished checkpoint was lost"


def kill_until_finished(run, rng, kills):
    """Kill and start again; count where the kills were.

    Args:
      run: The run.
      rng: Where the moments come from.
      kills: At most so many; then the run may finish.

    Returns:
      Kills by phase.
    """
    phases = collections.Counter()
    checkpoint = 0
    for _ in range(kills):
        # A quarter while it starts, a quarter around a checkpoint. The others a little after a step, at most so far
        # ahead that the run lasts for all of them, on a machine of any speed.
        kind = rng.random()
        if kind < 0.25:
            text, moment = "", rng.uniform(0, 6)
        else:
            every = run.config.checkpoint_every if kind < 0.5 else run.config.log_every
            ahead = rng.uniform(0, 1.5 * run.config.steps / kills)
            step = (int(checkpoint + ahead) // every + 1) * every
            text, moment = f"step {step}/", rng.uniform(0, 0.1)
        code, stderr = run.stop(text, moment, signal.SIGKILL)
        assert "Traceback" not in stderr, stderr
        assert_resumed(run, stderr, checkpoint)
        if code == 0:
            return phases
        assert code == -signal.SIGKILL, stderr
        phases[phase(run, stderr)] += 1
        checkpoint = run.finished_checkpoint()
    assert_resumed(run, run.finish(), checkpoint)
    return phases


def check(folder, rng, kills, **options):
    """A run that is killed again and again ends as one that is not: kills by phase."""
    uninterrupted, killed = Run(folder / "uninterrupted", **options), Run(folder / "killed", **options)
    uninterrupted.finish()
    phases = kill_until_finished(killed, rng, kills)
    print(f"{options['arguments']}: {sum(phases.values())} kills, {dict(phases)}")
    assert_same_end(killed, uninterrupted.end())
    assert killed.metrics() == uninterrupted.metrics()
    return phases


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One folder for prepared data, and a compilation cache: starts take seconds once a run was there."""
    folder = tmp_path_factory.mktemp("shared")
    return {"data__dir": str(folder), "cache": folder / "cache"}


@pytest.mark.slow
def test_kills_quick(shared, tmp_path):
    assert sum(check(tmp_path, random.Random(0), 4, **shared, **ADAM | {"steps": 400}).values()) >= 3


@pytest.mark.slow
def test_kills_at_more_than_fifty_moments(shared, tmp_path):
    phases = collections.Counter()
    for seed in range(7):
        arguments = EVERYTHING if seed == 0 else ADAM
        found = check(tmp_path / str(seed), random.Random(seed), 9, **shared, **arguments)
        assert sum(found.values()) >= 8
        phases += found
    assert phases.keys() >= {"import", "compilation", "training", "evaluation", "checkpoint"}, phases
