"""The plan of a sweep, its table, and small sweeps through real processes."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from simplest_vit import sweep
from simplest_vit.errors import UserError
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[1]


def test_the_plan_is_the_product_of_the_grid_and_the_seeds(tmp_path):
    axes = ["config.optimizer.learning_rate=5e-4,3e-4", "config.weight_decay=0,5e-5"]
    grid = sweep.parse_grid(axes, tiny_config())
    points = sweep.plan(grid, 3, 7, str(tmp_path), ["--config=configs/digits.py"])
    assert [list(point.values.values()) for point in points] == [
        ["5e-4", "0"],
        ["5e-4", "5e-5"],
        ["3e-4", "0"],
        ["3e-4", "5e-5"],
    ]
    assert points[1].commands[2][1:] == [
        "main.py",
        "--config=configs/digits.py",
        "--config.optimizer.learning_rate=5e-4",
        "--config.weight_decay=5e-5",
        "--config.seed=9",
        f"--workdir={tmp_path}/learning_rate=5e-4,weight_decay=5e-5/seed=9",
    ]
    folders = [folder for point in points for folder in point.workdirs]
    assert len(set(folders)) == 12


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("config.learning_rate=1", "no field 'learning_rate'"),
        ("optimizer.learning_rate=1", "expected config.FIELD="),
        ("config.weight_decay", "expected config.FIELD="),
        ("config.weight_decay=1,,2", "expected config.FIELD="),
        ("config.seed=1,2", "no field 'seed' to vary"),
    ],
)
def test_a_wrong_grid_is_one_line(axis, message):
    with pytest.raises(UserError) as caught:
        sweep.parse_grid([axis], tiny_config())
    assert message in str(caught.value)


def test_the_table_has_mean_and_deviation_over_seeds_best_first(tmp_path):
    points = sweep.plan({"weight_decay": ["0", "1"], "epochs": ["2", "9"]}, 2, 0, str(tmp_path), [])
    for point, accuracies in zip(points, [(0.5, 0.7), (0.8, 0.9), (0.4,), ()], strict=True):
        for seed, accuracy in enumerate(accuracies):
            point.workdirs[seed].mkdir(parents=True)
            results = {
                "validation_accuracy": accuracy,
                "best_validation_accuracy": accuracy,
                "steps": 1,
                "seed": seed,
                "config": {},
            }
            (point.workdirs[seed] / "results.json").write_text(json.dumps(results))
    lines = sweep.summary(points).splitlines()
    assert lines[0] == "| weight_decay | epochs | accuracy | best accuracy | finished |"
    assert lines[2] == "| 0 | 9 | 0.8500 ± 0.0707 (n = 2) | 0.8500 ± 0.0707 (n = 2) | 2 of 2 |"
    assert lines[3].startswith("| 0 | 2 | 0.6000 ± 0.1414 (n = 2) |")
    assert lines[4] == "| 1 | 2 | 0.4000 (n = 1) | 0.4000 (n = 1) | 1 of 2 |"
    assert lines[5] == "| 1 | 9 | no run | no run | 0 of 2 |"


def test_finished_runs_are_skipped_and_failures_counted(tmp_path):
    fails = [sys.executable, "-c", "raise SystemExit(2)"]
    works = [sys.executable, "-c", f"open({str(tmp_path / 'made')!r}, 'w')"]
    done = tmp_path / "done"
    done.mkdir()
    (done / "results.json").write_text("{}")
    commands = [fails, fails, works]
    folders = [done, tmp_path / "fails", tmp_path / "works"]
    assert sweep.execute([sweep.Point({}, folders, commands)]) == 1
    assert (tmp_path / "made").exists()


def command(tmp_path, *arguments):
    return [
        *(sys.executable, "-m", "simplest_vit.sweep", "--config", "configs/digits.py", f"--workdir={tmp_path}/sweep"),
        *(f"--config.data.dir={tmp_path}", "--config.model.depth=2", "--config.model.width=16"),
        *("--config.model.num_heads=2", "--config.model.mlp_dim=32", "--config.model.c_val_0_target=0.3"),
        *arguments,
    ]


@pytest.mark.slow
def test_a_small_sweep_quick(tmp_path):
    """Two points of a few steps; then the same command finds them finished."""
    line = command(tmp_path, "--config.steps=2", "--grid", "config.weight_decay=0,5e-5")
    first, second = (subprocess.run(line, cwd=ROOT, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("1 of 1") == 2
    assert second.stdout == first.stdout
    assert second.stderr.count("finished before") == 2


@pytest.mark.slow
def test_a_sweep_that_is_stopped_has_its_run_save_the_step(tmp_path):
    line = command(tmp_path, "--config.steps=100000", "--config.checkpoint_every=100000", "--config.log_every=10")
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        said = iter(process.stderr.readline, "")
        assert any("step 20/" in each for each in said)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        (saved,) = re.findall(r"^interrupted: step (\d+) of 100000 is saved", "".join(said), re.MULTILINE)
    assert process.returncode == os.EX_TEMPFAIL
    assert [path.parent.name for path in tmp_path.glob("sweep/**/record.json")] == [saved]
