"""The command line, through real processes: few, for importing alone takes seconds."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
    "--config.steps=4",
    "--config.eval_every=2",
    "--config.checkpoint_every=2",
    "--config.log_every=1",
    "--config.model.depth=2",
    "--config.model.width=16",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=32",
    "--config.model.c_val_0_target=0.3",
]


def main(*arguments, stdout=subprocess.PIPE):
    command = [sys.executable, "main.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300)


def test_train_then_evaluate(tmp_path):
    command = ["--config", "configs/digits.py", "--workdir", tmp_path / "run", *TINY, f"--config.data.dir={tmp_path}"]
    with open("/dev/full", "w") as full:  # what is printed is on the disk as well
        trained = main(*command, stdout=full)
    assert trained.returncode == 0, trained.stderr
    assert "standard output cannot be written (No space left on device)" in trained.stderr
    assert "Traceback" not in trained.stderr
    assert "step 4/4 (100.0%)" in trained.stderr
    assert "steps/s" in trained.stderr
    assert "ETA" in trained.stderr
    assert "blocks/attention/query/kernel" in trained.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").unlink()
    resumed = main("--workdir", tmp_path / "run")  # by the run's own config
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 4 of 4" in resumed.stderr
    again = json.loads(resumed.stdout)
    assert again["validation_accuracy"] == results["validation_accuracy"]
    evaluated = main("--workdir", tmp_path / "run", "--mode", "evaluate", "--output", str(tmp_path / "report"))
    assert evaluated.returncode == 0, evaluated.stderr
    latest = json.loads(evaluated.stdout)["latest"]
    assert latest["validation_accuracy"] == results["validation_accuracy"]
    assert {path.name for path in (tmp_path / "report").iterdir()} > {"classes.csv", "confusion.csv", "confusion.png"}
