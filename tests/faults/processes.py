"""Runs of main.py as real processes that can be stopped at a chosen line or moment."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.run import build
from simplest_vit.training.workdir import read_metrics, read_run
from tests.fork_server import xla_flags
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    "batch_size": 64,
    "warmup_steps": 2,
    "model.depth": 2,
    "model.width": 16,
    "model.num_heads": 2,
    "model.mlp_dim": 32,
    "model.c_val_0_target": 0.3,
}


class Run:
    """A command of main.py on the tiny digits config, in a folder of its own, that can be started again and again."""

    def __init__(self, workdir, *, arguments="optimizer=adam", cache=None, launcher=(), **overrides):
        overrides = TINY | {name.replace("__", "."): value for name, value in overrides.items()}
        self.workdir, self.config = pathlib.Path(workdir), tiny_config(arguments, **overrides)
        self.command = [*launcher, sys.executable, "main.py", f"--config=configs/digits.py:{arguments}"]
        self.command += [f"--config.{name}={value}" for name, value in overrides.items()] + [f"--workdir={workdir}"]
        self.environment = os.environ | {
            "XLA_FLAGS": xla_flags(devices=1),
            "SIMPLEST_VIT_TEST_RUN": str(workdir),  # for finding what it leaves behind
        }
        if cache:
            self.environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }

    def start(self):
        return subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def finish(self):
        """Run to the end: its standard error."""
        with self.start() as process:
            stderr = process.stderr.read()
        assert process.returncode == 0, stderr
        return stderr

    def stop(self, text, seconds, *numbers):
        """Start, wait for a line with a text ("": for none) and some seconds, then send signals.

        Returns:
          The exit code (negative: by that signal) and the standard error.
        """
        lines = []
        self.started = time.time()
        with self.start() as process:
            while text and text not in "".join(lines[-1:]) and process.poll() is None:
                lines.append(process.stderr.readline())
            for number in numbers:
                time.sleep(seconds)
                process.send_signal(number)
            lines.append(process.stderr.read())
        return process.returncode, "".join(lines)

    def finished_checkpoint(self):
        """The newest checkpoint that has its name and its record, or 0."""
        folders = (self.workdir / "checkpoints").glob("*/record.json")
        return max((int(path.parent.name) for path in folders if path.parent.name.isdigit()), default=0)

    def being_written(self):
        """Whether the process that was stopped last left a checkpoint half written."""
        return any(path.stat().st_ctime > self.started for path in (self.workdir / "checkpoints").glob("*tmp*"))

    def metrics(self):
        """The lines of `metrics.jsonl` without times."""
        lines = read_metrics(self.workdir)
        return [{tag: value for tag, value in line.items() if not tag.startswith("speed/")} for line in lines]

    def end(self):
        """The last state and what is said of it, without times and commit: equal for runs that went the same way."""
        with Checkpoints(self.workdir, create=False) as checkpoints:
            _, config, data = read_run(str(self.workdir))
            abstract = build(config, data).abstract
            state, progress = checkpoints.restore(abstract, checkpoints.newest())
            best = checkpoints.best()
        results = json.loads((self.workdir / "results.json").read_text())
        times = {"wall_time_s", "step_time_median_s", "images_per_second", "commit"}
        said = {
            name: value
            for name, value in {**results, **dataclasses.asdict(progress), "best": best}.items()
            if name not in times
        }
        return jax.tree.map(np.asarray, state), said


def assert_same_end(run, expected):
    """Bit-equal arrays, equal metrics."""
    (state, said), (expected_state, expected_said) = run.end(), expected
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    differ = {name: (said.get(name), value) for name, value in expected_said.items() if said.get(name) != value}
    assert not differ, differ
