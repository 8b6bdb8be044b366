"""The command line, through processes: one from its start, and forks, for importing alone takes seconds."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.fork_server import xla_flags

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


@pytest.fixture
def main(server):
    """Run a command line, in a fork."""

    def run(*arguments):
        ended = server.run(["main.py", *arguments])
        return subprocess.CompletedProcess(arguments, *ended)

    return run


def test_train_then_evaluate(main, tmp_path):
    command = ["--config", "configs/digits.py", "--workdir", tmp_path / "run", *TINY, f"--config.data.dir={tmp_path}"]
    printed = main(*command, "--print_config")
    assert printed.returncode == 0, printed.stderr
    assert list(tmp_path.iterdir()) == []
    with open("/dev/full", "w") as full:  # what is printed is on the disk as well
        whole = [sys.executable, "main.py", *map(str, command)]
        environment = os.environ | {"XLA_FLAGS": xla_flags(devices=1)}
        trained = subprocess.run(
            whole, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300
        )
    assert trained.returncode == 0, trained.stderr
    assert "standard output cannot be written (No space left on device)" in trained.stderr
    assert "Traceback" not in trained.stderr
    assert "compiling the training step" in trained.stderr
    assert "config.model.c_val_0_target=0.3 has no effect on this isometric_vit (TAT: eta" in trained.stderr
    assert trained.stderr.count("has no effect") == 1
    assert "step 4/4 (100.0%)" in trained.stderr
    assert "steps/s" in trained.stderr
    assert "ETA" in trained.stderr
    assert "blocks/attention/query/kernel" in trained.stderr
    assert json.loads(printed.stdout) == json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "moved").mkdir()
    (tmp_path / "digits").rename(tmp_path / "moved" / "digits")
    resumed = main("--workdir", tmp_path / "run", f"--config.data.dir={tmp_path / 'moved'}")  # by the run's own config
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 4 of 4" in resumed.stderr
    assert "compiling" not in resumed.stderr, "no step is left"
    assert "has no effect" not in resumed.stderr, "only fields that this command sets"
    again = json.loads(resumed.stdout)
    assert again["validation_accuracy"] == results["validation_accuracy"]
    evaluated = main("evaluate", "--workdir", tmp_path / "run", "--output", str(tmp_path / "report"))
    assert evaluated.returncode == 0, evaluated.stderr
    latest = json.loads(evaluated.stdout)["latest"]
    assert latest["validation_accuracy"] == results["validation_accuracy"]
    assert {path.name for path in (tmp_path / "report").iterdir()} > {"classes.csv", "confusion.csv", "confusion.png"}


def test_a_folder_of_photos_from_training_to_a_table(main, tmp_path):
    rng = np.random.default_rng(0)
    for folder, count in (("photos", 20), ("new", 5)):
        for name, light in (("dark", 60), ("light", 180)):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(light - 60, light + 60, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{i}.png")
    data = [f"--config.data.manual_dir={tmp_path / 'photos'}", f"--config.data.dir={tmp_path / 'tfds'}"]
    data += ["--config.batch_size=16", "--config.data.train_split=train[:90%]"]
    data += ["--config.data.validation_split=train[90%:]+validation"]
    trained = main("train", "--config", "photos", "--workdir", tmp_path / "run", *TINY, *data)
    assert trained.returncode == 0, trained.stderr
    assert "80 % of each class for training, 20 % for validation" in trained.stderr
    predicted = main(
        "predict", "--workdir", tmp_path / "run", "--images", tmp_path / "new", "--csv", tmp_path / "t.csv"
    )
    assert predicted.returncode == 0, predicted.stderr
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    correct = sum(pathlib.Path(row["file"]).parent.name == row["class"] for row in rows)
    others = ("--image_folder", tmp_path / "new", "--output", tmp_path / "report")
    evaluated = main("evaluate", "--workdir", tmp_path / "run", *others)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["best"]["validation_accuracy"] == correct / 10
    with (tmp_path / "report" / "classes.csv").open(newline="") as file:
        assert [row["images"] for row in csv.DictReader(file)] == ["5", "5"], "all images of the folder"
    (tmp_path / "parted").mkdir()
    (tmp_path / "photos").rename(tmp_path / "parted" / "train")
    (tmp_path / "new").rename(tmp_path / "parted" / "val")
    evaluated = main(
        *(
            "evaluate",
            "--workdir",
            tmp_path / "run",
            "--image_folder",
            tmp_path / "parted",
            "--output",
            tmp_path / "all",
        )
    )
    assert evaluated.returncode == 0, evaluated.stderr
    with (tmp_path / "all" / "classes.csv").open(newline="") as file:
        assert [row["images"] for row in csv.DictReader(file)] == ["5", "5"], "those of val/, whatever the run's split"
